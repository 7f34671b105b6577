"""Loading what a recipe names: user code as `path.py:name`, and YAML files that list such code."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from agentloop.errors import ConfigError, UserError


def is_file_reference(reference: str) -> bool:
    """Whether `reference` is `path.py:name`, rather than the name of an entry point or a data file."""
    return reference.rpartition(":")[0].endswith(".py")


def load_from_file(reference: str, key: str) -> Any:
    """The object that `path.py:name` names; the file's folder is importable while it loads.

    Args:
        key: the config key that holds the reference, for the message.

    Raises:
        ConfigError: the file is missing, raises when imported, or has no such name.
    """
    path_text, _, name = reference.rpartition(":")
    path = Path(path_text)
    if not path.is_file():
        raise ConfigError(f"{key}: {path} does not exist", "write path.py:name, relative to the recipe's folder")
    module_name = f"_agentloop_user_{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        sys.path.insert(0, str(path.parent))
        try:
            spec.loader.exec_module(module)
        except Exception as exc:
            del sys.modules[module_name]
            raise ConfigError(
                f"{key}: {path} cannot be imported: {type(exc).__name__}: {exc}", "mend that file"
            ) from exc
        finally:
            sys.path.remove(str(path.parent))
    if not hasattr(module, name):
        raise ConfigError(f"{key}: {path} has no {name!r}", "correct the name after the colon")
    return getattr(module, name)


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
