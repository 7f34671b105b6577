"""Loading what a recipe names: user code as `path.py:name`, and YAML files that list such code."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from agentloop.errors import ConfigError, UserError


def is_file_reference(reference: str) -> bool:
    """Whether `reference` is `path.py:name`, rather than the name of an entry point or a data file."""
    return reference.rpartition(":")[0].endswith(".py")


def load_from_file(reference: str, key: str) -> Any:
    """Return the object that `path.py:name` names.

    A file is imported once in a process, as a member of a package of its own folder: `from .reward import score` finds
    `reward.py` beside it, and two recipes may have files of the same name. The folder is also importable while the
    file loads (`import helpers`).

    Args:
        key: the config key that holds the reference, for the message.

    Raises:
        ConfigError: the file is missing, raises when imported, or does not define the name.
    """
    path_text, _, name = reference.rpartition(":")
    path = Path(path_text)
    if not path.is_file():
        raise ConfigError(f"{key}: {path} does not exist", "write path.py:name, relative to the recipe's folder")

    module_name = f"{_package_of(path.parent)}.{path.stem}"
    module = sys.modules.get(module_name)
    if module is None:
        try:
            module = _import_file(module_name, path)
        except Exception as exc:
            raise ConfigError(
                f"{key}: {path} cannot be imported: {type(exc).__name__}: {exc}", "correct that file"
            ) from exc
    if not hasattr(module, name):
        raise ConfigError(f"{key}: {path} does not define {name!r}", "correct the name after the colon")
    return getattr(module, name)


def _package_of(folder: Path) -> str:
    """Name of the package that stands for `folder`; created when it is first asked for."""
    digest = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=4).hexdigest()
    name = f"_agentloop_user_{re.sub(r'[^0-9A-Za-z_]', '_', folder.resolve().name)}_{digest}"
    if name not in sys.modules:
        package = ModuleType(name, f"Files of {folder}.")
        package.__path__ = [str(folder.resolve())]
        sys.modules[name] = package
    return name


def _import_file(module_name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)

    # Registered before it runs: dataclasses and relative imports look the module up by its name.
    sys.modules[module_name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module


def read_entries(path: Path, key: str, example: str, error: type[UserError]) -> list[Any]:
    """The list that a YAML file holds under `key`.

    Args:
        key: `tools` for instance; the recipe's key has the same name, with or without an s at its end.
        example: how an entry is written, for the message.
        error: raised.

    Raises:
        UserError: of the kind `error`: there is no such file, it is no YAML, or it holds no such list.
    """
    import yaml

    setting = key.rstrip("s") + "s"
    if not path.is_file():
        raise error(f"{setting}: {path} does not exist", f"give an existing YAML, or set {setting} to null")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as exc:
        raise error(f"{path} is not valid YAML: {exc}", "check indentation, colons and quotes there") from exc
    entries = data.get(key, data.get(setting)) if isinstance(data, dict) else None
    if not isinstance(entries, list) or not entries:
        raise error(f"{path} has no list `{key}`", f"write {key}: [{example}]")
    return entries
