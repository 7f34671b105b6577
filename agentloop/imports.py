"""Loading user code named as `path.py:name`."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from agentloop.errors import ConfigError


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
