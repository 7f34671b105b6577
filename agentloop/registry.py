"""Resolve the names in recipes and YAML files to objects.

A name is an entry point that an installed package registered in one of the groups below,
`path.py:name` (a file of the user), or `module.path.Class`. A registered name wins over a file or a
folder that is spelled the same. Entry points load the same way in every process.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from agentloop.errors import RegistryError
from agentloop.imports import RECIPE_BASE, foreign_package, is_file_reference, load_from_file
from agentloop.text import clean, did_you_mean

AGENTS, TOOLS, REWARDS = "agentloop.agents", "agentloop.tools", "agentloop.rewards"
INTERACTIONS = "agentloop.interactions"
DATASETS, LOGGERS = "agentloop.datasets", "agentloop.loggers"
TRACES = "agentloop.traces"


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
            f"{clean(repr(name), 200)} is not registered in {group}; known: {', '.join(known) or 'none'}",
            did_you_mean(name, known, "install the package that registers it, correct the name, or name path.py:name"),
        )
    entry = known[name]
    try:
        return entry.load()
    except Exception as exc:
        raise RegistryError(
            f"{name!r} ({entry.value}) of {group} cannot be loaded: {type(exc).__name__}: {exc}",
            "reinstall or fix the package that registers it",
        ) from exc


def load_reference(
    reference: str,
    folder: Path,
    group: str,
    *,
    key: str = "class_name",
    modules: bool = True,
    base: str = RECIPE_BASE,
) -> Any:
    """Return the object named by an entry point of `group`, `path.py:name`, or `module.path.Class`.

    A registered name wins over everything else that is spelled the same.

    Args:
        folder: base of a relative `path.py`.
        key: the key that holds the reference, for messages.
        modules: accept `module.path.Class`; otherwise a dot is part of an entry point's name.
        base: what `folder` is, for messages.

    Raises:
        ConfigError: the file is missing, raises when imported, or does not define the name.
        RegistryError: the entry point is unknown, or the import fails.
    """
    if reference in registered(group):
        return load(group, reference)
    if is_file_reference(reference):
        return load_from_file(str(folder / Path(reference).expanduser()), key, base)

    module_name, _, attribute = reference.rpartition(".")
    if not module_name or not modules:
        return load(group, reference)
    try:
        return getattr(import_module(module_name), attribute)
    except Exception as exc:
        foreign = foreign_package(module_name.partition(".")[0])
        hint = "install the package it is in, correct the name (module.path.Class), or name a file, path.py:Class"
        if foreign is not None:
            hint = f"{foreign} hides agentloop's package of that name: start elsewhere, or name a file, path.py:Class"
        raise RegistryError(
            f"{key} {clean(reference, 200)} cannot be imported: {type(exc).__name__}: {exc}", hint
        ) from exc
