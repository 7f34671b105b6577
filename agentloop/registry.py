"""Resolve the names in recipes and YAML files to objects.

A name is `path.py:name` (a file of the user), `module.path.Class`, or an entry point that an
installed package registered in one of the groups below. Entry points load the same way in every
process.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from agentloop.errors import RegistryError
from agentloop.imports import is_file_reference, load_from_file

AGENTS, TOOLS, REWARDS = "agentloop.agents", "agentloop.tools", "agentloop.rewards"
INTERACTIONS = "agentloop.interactions"
DATASETS, LOGGERS = "agentloop.datasets", "agentloop.loggers"


@lru_cache
def registered(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of a group by name.

    Raises:
        RegistryError: two packages registered the same name.
    """
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=group):
        other = found.get(entry.name)
        # An editable install beside its build folder lists the same entry twice.
        if other is not None and other.value != entry.value:
            raise RegistryError(
                f"{entry.name!r} is registered twice in {group}: {other.value} and {entry.value}",
                "uninstall or rename one of them",
            )
        found[entry.name] = entry
    return dict(sorted(found.items()))


def load(group: str, name: str) -> Any:
    """Load one entry point.

    Raises:
        RegistryError: the name is unknown (the known ones are listed), or its import fails.
    """
    known = registered(group)
    if name not in known:
        raise RegistryError(
            f"{name!r} is not registered in {group}; known: {', '.join(known) or 'none'}",
            "install the package that registers it, or correct the name",
        )
    entry = known[name]
    try:
        return entry.load()
    except Exception as exc:
        raise RegistryError(
            f"{name!r} ({entry.value}) of {group} cannot be loaded: {type(exc).__name__}: {exc}",
            "reinstall or fix the package that registers it",
        ) from exc


def load_reference(reference: str, folder: Path, group: str, *, key: str = "class_name", modules: bool = True) -> Any:
    """Return the object named by `path.py:name`, `module.path.Class`, or an entry point of `group`.

    Args:
        folder: base of a relative `path.py`.
        key: the key that holds the reference, for messages.
        modules: accept `module.path.Class`; otherwise a dot is part of an entry point's name.

    Raises:
        ConfigError: the file is missing, raises when imported, or does not define the name.
        RegistryError: the entry point is unknown, or the import fails.
    """
    if is_file_reference(reference):
        return load_from_file(str(folder / reference), key)

    module_name, _, attribute = reference.rpartition(".")
    if not module_name or not modules:
        return load(group, reference)
    try:
        return getattr(import_module(module_name), attribute)
    except Exception as exc:
        raise RegistryError(
            f"{key} {reference} cannot be imported: {type(exc).__name__}: {exc}",
            "install the package it is in, or correct the name (module.path.ClassName)",
        ) from exc
