"""Load user code (`path.py:name`) and the lists of YAML files.

`agentloop.registry` resolves every name in a YAML; it uses this module for files.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import re
import sys
import threading
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from agentloop.errors import ConfigError, UserError


def is_file_reference(reference: str) -> bool:
    """Whether `reference` is `path.py:name`, as opposed to an entry point or a data file."""
    return reference.rpartition(":")[0].endswith(".py")


_LOCK = threading.RLock()


def load_from_file(reference: str, key: str) -> Any:
    """Return the object that `path.py:name` names.

    A file is imported once per process, as a member of a package for its folder: `from .reward
    import score` finds `reward.py` beside it, and two recipes may have files of the same name. The
    folder is also importable while the file loads (`import helpers`), but then all recipes of the
    process share the name.

    Args:
        key: the config key that holds the reference, for messages.

    Raises:
        ConfigError: the file is missing, raises when imported, or does not define the name.
    """
    path_text, _, name = reference.rpartition(":")
    path = Path(path_text)
    if not path.is_file():
        raise ConfigError(f"{key}: {path} does not exist", "write path.py:name, relative to the recipe's folder")

    package = _package_of(path.parent)
    module_name = f"{package}.{path.stem.replace('.', '_')}"
    with _LOCK:  # another thread must not see a module that is half executed
        module = sys.modules.get(module_name)
        if module is None:
            try:
                module = _import_file(module_name, path)
            except Exception as exc:
                text, place = _describe(exc, package, path)
                raise ConfigError(f"{key}: {path} cannot be imported: {text}", f"correct {place}") from exc

    if not hasattr(module, name):
        raise ConfigError(f"{key}: {path} does not define {name!r}", "correct the name after the colon")
    return getattr(module, name)


def _package_of(folder: Path) -> str:
    """Return the name of the package for `folder`; create it on first use."""
    digest = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=4).hexdigest()
    name = f"_agentloop_user_{re.sub(r'[^0-9A-Za-z_]', '_', folder.resolve().name)}_{digest}"
    if name not in sys.modules:
        package = ModuleType(name, f"Files of {folder}.")
        package.__path__ = [str(folder.resolve())]
        sys.modules[name] = package
    return name


def _describe(exc: Exception, package: str, path: Path) -> tuple[str, str]:
    """Return an import error without the package's internal name, and the place to correct."""
    text = f"{type(exc).__name__}: {exc}".replace(f"{package}.", "").replace(package, path.parent.name)
    if isinstance(exc, SyntaxError):
        return text, str(exc.filename or path)

    folder = path.parent.resolve()
    frames = [
        frame for frame in traceback.extract_tb(exc.__traceback__) if Path(frame.filename).resolve().parent == folder
    ]
    return text, f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else str(path)


def _import_file(module_name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)

    # Register it before it runs: dataclasses and relative imports look the module up by name.
    before = set(sys.modules)
    sys.modules[module_name] = module
    sys.path.insert(0, str(path.parent))
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


def read_entries(path: Path, key: str, example: str, error: type[UserError]) -> list[Any]:
    """Return the list that a YAML file holds under `key`.

    Args:
        key: for instance `tools`. The recipe's key is the same name with an s at its end, which the
            file may use too.
        example: an example of an entry, for messages.
        error: class of the error to raise.

    Raises:
        UserError: an `error`, if the file is missing, is not YAML, or has no such list.
    """
    import yaml

    setting = key.rstrip("s") + "s"
    if not path.is_file():
        raise error(f"{setting}: {path} does not exist", f"give an existing YAML file, or set {setting} to null")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as exc:
        raise error(f"{path} is not valid YAML: {exc}", "check its indentation, colons and quotes") from exc

    entries = data.get(key, data.get(setting)) if isinstance(data, dict) else None
    if not isinstance(entries, list) or not entries:
        raise error(f"{path} has no list `{key}`", f"write {key}: [{example}]")
    return entries
