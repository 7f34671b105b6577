"""Load user code (`path.py:name`), and YAML files, which may be wrong or hostile.

`agentloop.registry` resolves every name in a YAML; it uses this module for files.

A file is imported as a member of a package for its folder, so that two recipes may have files of
the same name. `import helpers` in such a file means the `helpers.py` beside it, and not one that
another recipe has imported before: `_SiblingFirst` gives the file an `__import__` of its own.
"""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import importlib.util
import re
import sys
import threading
import traceback
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from agentloop.errors import ConfigError, UserError
from agentloop.files import is_file
from agentloop.text import clean, did_you_mean

if TYPE_CHECKING:
    from yaml import Node


def is_file_reference(reference: str) -> bool:
    """Whether `reference` is `path.py:name`, as opposed to an entry point or a data file."""
    return reference.rpartition(":")[0].endswith(".py")


_LOCK = threading.RLock()

PREFIX = "_agentloop_user_"
"""Beginning of the names of the packages that stand for recipes' folders."""

PACKAGES = ("agentloop", "rollout_server", "trainer", "tools", "recipes")
MARKER = "AGENTLOOP_PACKAGE"
"""Each package of this project sets `AGENTLOOP_PACKAGE = "<distribution>"` in `__init__.py`."""

DISTRIBUTION = "agentloop-rl"


RECIPE_BASE = "the recipe's folder (in an override: to the working directory)"
"""What paths of a recipe are relative to, for messages."""


def load_from_file(reference: str, key: str, base: str = RECIPE_BASE) -> Any:
    """Return the object that `path.py:name` names.

    A file is imported once per process. Both `from .reward import score` and `from reward import
    score` find the `reward.py` beside it.

    Args:
        key: the config key that holds the reference, for messages.
        base: what a relative path is relative to, for messages.

    Raises:
        ConfigError: the file is missing, raises when imported, or does not define the name.
    """
    path_text, _, name = reference.rpartition(":")
    path = Path(path_text)
    if not is_file(path):
        raise ConfigError(
            f"{key}: {clean(path, 300)} does not exist",
            f"write path.py:name, relative to {base}",
        )

    package = _package_of(path.parent)
    module_name = f"{package}.{path.stem.replace('.', '_')}"
    with _LOCK:  # another thread must not see a module that is half executed
        module = sys.modules.get(module_name)
        if module is None:
            try:
                module = _import_file(module_name, path)
            except (Exception, SystemExit) as exc:  # a script that calls sys.exit() when it is imported
                text, place = _describe(exc, package, path)
                raise ConfigError(f"{key}: {path} cannot be imported: {text}", f"correct {place}") from exc

    if not hasattr(module, name):
        near = did_you_mean(
            name, [n for n in vars(module) if not n.startswith("_")], "correct the name after the colon"
        )
        raise ConfigError(f"{key}: {path} does not define {clean(repr(name), 200)}", near)
    return getattr(module, name)


def _package_of(folder: Path) -> str:
    """Return the name of the package for `folder`; create it on first use."""
    digest = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=4).hexdigest()
    name = f"{PREFIX}{re.sub(r'[^0-9A-Za-z_]', '_', folder.resolve().name)}_{digest}"
    if name not in sys.modules:
        package = ModuleType(name, f"Files of {folder}.")
        package.__path__ = [str(folder.resolve())]
        sys.modules[name] = package
    return name


def _describe(exc: BaseException, package: str, path: Path) -> tuple[str, str]:
    """Return an import error without the package's internal name, and the place to correct."""
    text = f"{type(exc).__name__}: {exc}".replace(f"{package}.", "").replace(package, path.parent.name)
    if isinstance(exc, SyntaxError):
        return text, str(exc.filename or path)

    folder = path.parent.resolve()
    frames = [
        frame for frame in traceback.extract_tb(exc.__traceback__) if Path(frame.filename).resolve().parent == folder
    ]
    return text, f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else str(path)


class _SiblingFirst(SourceFileLoader):
    """Loads a file of a recipe so that `import helpers` in it finds the recipe's own files first.

    They are those of the folder of the named file, also for files in its subfolders. The import
    runs whenever the statement does, also in a function that is called later.
    """

    def exec_module(self, module: ModuleType) -> None:
        package = module.__name__.partition(".")[0]
        folder = Path(sys.modules[package].__path__[0])

        def import_(
            name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
        ) -> ModuleType:
            first = name.partition(".")[0]
            if level or first in sys.stdlib_module_names or not _is_sibling(folder, first):
                return builtins.__import__(name, globals, locals, fromlist, level)
            found = importlib.import_module(f"{package}.{name}")
            if not fromlist:
                return sys.modules[f"{package}.{first}"]  # `import a.b` binds a
            for attribute in fromlist:
                if attribute != "*" and not hasattr(found, attribute) and hasattr(found, "__path__"):
                    with contextlib.suppress(ModuleNotFoundError):
                        importlib.import_module(f"{found.__name__}.{attribute}")
            return found

        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": import_}
        super().exec_module(module)


def _is_sibling(folder: Path, name: str) -> bool:
    return is_file(folder / f"{name}.py") or is_file(folder / name / "__init__.py")


class _SiblingFinder(MetaPathFinder):
    """Finds the modules of the packages that `_package_of` makes."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(PREFIX) or path is None:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _SiblingFirst(name, spec.loader.path)
        return spec


sys.meta_path.insert(0, _SiblingFinder())


def _import_file(module_name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        module_name, path, loader=_SiblingFirst(module_name, str(path.resolve()))
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)

    # Register it before it runs: dataclasses and relative imports look the module up by name.
    before = set(sys.modules)
    sys.modules[module_name] = module
    sys.path.insert(0, str(path.parent))  # for packages without __init__.py, and importlib.import_module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        # Siblings that it imported go too: a corrected file may need corrected siblings.
        package = module_name.rpartition(".")[0]
        for name in [name for name in sys.modules if name.startswith(f"{package}.") and name not in before]:
            del sys.modules[name]
        raise
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(path.parent))
    return module


def foreign_package(name: str) -> Path | None:
    """Return the place of a package that has the name of one of ours and hides it; else None."""
    if name not in PACKAGES:
        return None
    place = package_place(name)
    return None if place is None or is_ours(place) else place


def package_place(name: str) -> Path | None:
    """Return the file or folder that a package would be imported from, without importing it."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    path = spec.origin if spec and spec.origin else None
    if path is None and spec and spec.submodule_search_locations:  # a namespace package has folders only
        path = next(iter(spec.submodule_search_locations), None)
    return Path(path) if path is not None else None


def is_ours(place: Path) -> bool:
    """Whether `place` is the `__init__.py` of a package of this project."""
    if place.name != "__init__.py":
        return False
    try:
        return f'{MARKER} = "{DISTRIBUTION}"' in place.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


MAX_BYTES = 2**20
MAX_DEPTH = 64
MAX_NODES = 100_000
"""Values of a file once its aliases are expanded; each level of aliases can multiply them."""


def read_yaml_text(path: Path, name: str, error: type[UserError], missing_hint: str = "give an existing file") -> str:
    """Return the text of a YAML file; a mark at its start is left out.

    Args:
        name: what the file is, for messages: `config file recipe.yaml`.
        error: class of the error to raise.

    Raises:
        UserError: an `error`, if it is missing, is not a regular file, is too large, cannot be
            read, or is not UTF-8.
    """
    try:
        if not path.is_file():
            there = path.exists()
            raise error(f"{name} is not a file" if there else f"{name} does not exist", missing_hint)
        if path.stat().st_size > MAX_BYTES:
            raise error(f"{name} has more than {MAX_BYTES >> 20} MB", "give a YAML file of settings, not of data")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as exc:  # ValueError: not UTF-8, or a NUL in the path
        raise error(f"{name} cannot be read: {_reason(exc)}", "give a readable YAML file in UTF-8") from exc


def compose(text: str, name: str, error: type[UserError]) -> Node | None:
    """Parse YAML into nodes, which keep the text of each scalar; None for an empty document.

    Raises:
        UserError: an `error`, if the text is not YAML, or is too large or too deep when its aliases
            are expanded. The message has line and column, and none of the text, which may hold a
            secret.
    """
    import yaml

    try:
        node: Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as exc:
        what = f"{name} is not valid YAML: {describe_yaml_error(exc)}"
        raise error(what, "check its indentation, colons and quotes") from exc
    except RecursionError as exc:
        raise _too_deep(name, error) from exc
    if node is not None:
        size, _ = _measure(node, {}, 0, name, error)
        if size > MAX_NODES:
            raise error(
                f"{name} has more than {MAX_NODES:,} values when its aliases (*name) are expanded", "shorten it"
            )
    return node


def describe_yaml_error(exc: Exception) -> str:
    """Return the problem and its line, without the lines of the file that YAML would quote."""
    problem = str(getattr(exc, "problem", None) or getattr(exc, "reason", None) or type(exc).__name__)
    mark: Any = getattr(exc, "problem_mark", None) or getattr(exc, "context_mark", None)
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else problem


def _measure(
    node: Node, known: dict[int, tuple[int, int]], depth: int, name: str, error: type[UserError]
) -> tuple[int, int]:
    """Return number of values and depth below a node; an alias counts as what it stands for."""
    if id(node) not in known:
        if depth > MAX_DEPTH:  # also of a node that contains itself
            raise _too_deep(name, error)
        children: list[Node] = []
        for child in node.value if isinstance(node.value, list) else ():
            children += child if isinstance(child, tuple) else [child]
        measured = [_measure(child, known, depth + 1, name, error) for child in children]
        known[id(node)] = (
            1 + sum(size for size, _ in measured),
            1 + max((height for _, height in measured), default=0),
        )
    size, height = known[id(node)]
    if depth + height > MAX_DEPTH + 1:
        raise _too_deep(name, error)
    return size, height


def _too_deep(name: str, error: type[UserError]) -> UserError:
    return error(f"{name} is nested more than {MAX_DEPTH} levels deep", "write it flatter")


def _reason(exc: Exception) -> str:
    if isinstance(exc, UnicodeDecodeError):
        return f"byte {exc.start} is not UTF-8"
    return (exc.strerror if isinstance(exc, OSError) else None) or str(exc)


def read_entries(
    path: Path, key: str, example: str, error: type[UserError], keys: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the list of mappings that a YAML file holds under `key`.

    Args:
        key: for instance `tools`. The recipe's key is the same name with an s at its end, which the
            file may use too.
        example: an example of an entry, for messages.
        error: class of the error to raise.
        keys: the keys that an entry may have.

    Raises:
        UserError: an `error`, if the file is missing, is not YAML, or has no such list; or if an
            entry has another key.
    """
    import yaml

    setting = key.rstrip("s") + "s"
    if ".py" in (path.suffix, path.suffix.partition(":")[0]):
        reference = clean(path.name if ":" in path.name else f"{path.name}:name", 200)
        raise error(
            f"{setting}: {clean(path, 300)} is a Python file, not a YAML file",
            f"list it in a YAML file, {setting}: [{{class_name: ./{reference}}}], and name that file",
        )
    text = read_yaml_text(
        path, f"{setting}: {clean(path, 300)}", error, f"give an existing YAML file, or set {setting} to null"
    )
    compose(text, str(path), error)
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError) as exc:
        raise error(f"{path} is not valid YAML: {describe_yaml_error(exc)}", "correct that line") from exc

    entries = data.get(key, data.get(setting)) if isinstance(data, dict) else None
    if not isinstance(entries, list) or not entries:
        raise error(f"{path} has no list `{key}`", f"write {key}: [{example}]")
    for number, entry in enumerate(entries, 1):
        where = f"{path}, {key.rstrip('s')} {number}"
        if not isinstance(entry, dict):
            raise error(f"{where} is not a mapping", f"write {example}")
        for name in entry:
            if name not in keys:
                raise error(
                    f"{where} has the unknown key {clean(repr(name), 200)}",
                    did_you_mean(str(name), keys, f"known keys: {', '.join(keys)}"),
                )
    return entries
