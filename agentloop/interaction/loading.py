"""`Interactions`: a run's interactions by name, from the recipe's YAML and from packages."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentloop.errors import ConfigError, RegistryError
from agentloop.imports import read_entries
from agentloop.interaction.base import Interaction
from agentloop.interaction.session import InteractionSession
from agentloop.registry import INTERACTIONS, load, load_reference, registered
from agentloop.text import did_you_mean
from agentloop.types import Task


class Interactions:
    """The interactions of a run, by the names that rows use.

    Interactions that packages register in the entry-point group `agentloop.interactions` need no
    entry in a YAML.
    """

    def __init__(self, named: Mapping[str, Interaction] | None = None) -> None:
        self.named: dict[str, Interaction] = dict(named or {})

    def check(self, task: Task, where: str) -> str | None:
        """Load the interaction that a row names; return its name, or None if it names none.

        Args:
            where: the row, for error messages.

        Raises:
            ConfigError: it names an unknown interaction.
            RegistryError: the registered object is not an interaction.
        """
        kwargs = task.interaction_kwargs
        if kwargs is None:
            return None

        place = f"{where}: column 'extra_info.interaction_kwargs'"
        name = kwargs.get("name")
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{place} has no name", 'add "name": "<an interaction>"')
        if name not in self.named:
            known = sorted({*self.named, *registered(INTERACTIONS)})
            if name not in known:
                raise ConfigError(
                    f"{place} names the interaction {name!r}; known: {', '.join(known) or 'none'}",
                    did_you_mean(
                        name,
                        known,
                        "correct the row, add it to the YAML that `interactions` names, or install its package",
                    ),
                )
            self.named[name] = _create(load(INTERACTIONS, name), {}, f"interaction {name!r}")
        return name

    def session(self, task: Task) -> InteractionSession | None:
        """Return the interaction of one episode, or None if its row has none."""
        kwargs = task.interaction_kwargs
        if kwargs is None:
            return None
        rest = {key: value for key, value in kwargs.items() if key != "name"}
        return InteractionSession(kwargs["name"], self.named[kwargs["name"]], task, rest)


def load_interactions(path: Path) -> Interactions:
    """Load an interactions YAML: `interaction: [{name, class_name, config}]`.

    `class_name` is `module.path.Class`, `path.py:Class` relative to the YAML, or a name that a
    package registered in the entry-point group `agentloop.interactions`. Rows use `name`, which
    defaults to the class_name.

    Raises:
        ConfigError: naming file, entry and class.
    """
    entries = read_entries(
        path, "interaction", "{name: .., class_name: .., config: {..}}", ConfigError, ("name", "class_name", "config")
    )
    named: dict[str, Interaction] = {}

    for number, entry in enumerate(entries, 1):
        where = f"{path}, interaction {number}"
        if not isinstance(entry.get("class_name"), str):
            raise ConfigError(f"{where} has no class_name", "name a class, for instance my_pkg.users.PatientUser")
        name = str(entry.get("name") or entry["class_name"])
        if name in named:
            raise ConfigError(f"{where}: two interactions are named {name!r}", "give each a different name")
        try:
            kind = load_reference(
                entry["class_name"], path.parent, INTERACTIONS, base="the folder of the interaction YAML"
            )
        except (ConfigError, RegistryError) as exc:
            raise ConfigError(f"{where}: {exc.message}", exc.hint) from exc
        config = entry.get("config") or {}
        if not isinstance(config, dict):
            raise ConfigError(f"{where}: config is not a mapping", "write config: {key: value}")
        named[name] = _create(kind, config, f"{where}: {entry['class_name']}")
    return Interactions(named)


def _create(kind: Any, config: Mapping[str, Any], where: str) -> Interaction:
    if not (inspect.isclass(kind) and issubclass(kind, Interaction)):
        raise ConfigError(f"{where} is not an Interaction", "subclass agentloop.Interaction")
    if inspect.isabstract(kind):
        raise ConfigError(f"{where} is abstract", "write its method respond()")
    for method in ("start", "respond", "close"):
        if not inspect.iscoroutinefunction(getattr(kind, method)):
            raise ConfigError(
                f"{where}: {method}() is not an `async def`", "make it one; run what blocks in asyncio.to_thread"
            )
    try:
        return kind(config)
    except Exception as exc:
        raise ConfigError(f"{where} could not be created: {type(exc).__name__}: {exc}", "see its `config`") from exc
