"""Find the agent loops that rows and recipes name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path

from agentloop.agent.base import AgentLoop
from agentloop.config import AgentConfig
from agentloop.errors import RegistryError, UserError
from agentloop.imports import is_file_reference
from agentloop.registry import AGENTS, load_reference, registered
from agentloop.text import clean, did_you_mean


class Agents:
    """The agent loops of a run by name.

    A name is a key of the recipe's `agents` that has a `class`, a registered name, or
    `path.py:Class`.

    Args:
        configs: the recipe's `agents`.
        folder: base of a relative `path.py`.

    Raises:
        ConfigError: the file of a `class` is missing, or does not define it.
        RegistryError: a key of `agents` is the name of no agent, or a `class` cannot be loaded.
    """

    def __init__(self, configs: Mapping[str, AgentConfig], folder: Path = Path()) -> None:
        self._folder = folder
        self._classes = {
            name: load_agent(config.class_, folder, key=f"agents.{name}.class", modules=True)
            for name, config in configs.items()
            if config.class_ is not None
        }
        for name in configs:
            if name not in self.known and not is_file_reference(name):
                raise RegistryError(
                    f"agents.{clean(name, 200)}: no agent has this name, so its limits would go unused; "
                    f"known: {', '.join(self.known)}",
                    did_you_mean(name, self.known, f"correct the name, or name its class: agents.{name}.class"),
                )

    @property
    def known(self) -> list[str]:
        """The names that need no file: those with a `class`, and the registered ones."""
        return sorted({*self._classes, *registered(AGENTS)})

    def get(self, name: str, where: str) -> type[AgentLoop]:
        """Return the class of an agent; a class is loaded once.

        Args:
            where: the row or key that names it, for messages.

        Raises:
            RegistryError: no agent has this name, or it is not an agent loop.
            ConfigError: its file is missing, or does not define the class.
        """
        if name not in self._classes:
            if name not in registered(AGENTS) and not is_file_reference(name):
                raise RegistryError(
                    f"{where} has agent_name {clean(repr(name), 200)}; known: {', '.join(self.known)}",
                    did_you_mean(
                        name,
                        self.known,
                        "correct it, write path.py:Class, name the class in the recipe (agents.<name>.class), or "
                        "install its package (`agentloop agents list`)",
                    ),
                )
            try:
                self._classes[name] = load_agent(name, self._folder, key="agent_name")
            except UserError as exc:
                raise type(exc)(f"{where}: {exc.message}", exc.hint) from exc
        return self._classes[name]


def load_agent(reference: str, folder: Path = Path(), *, key: str = "agent", modules: bool = False) -> type[AgentLoop]:
    """Load an agent loop: a registered name, or `path.py:Class`.

    Args:
        folder: base of a relative path.
        key: the key that holds the reference, for messages.
        modules: accept `module.path.Class` too.

    Raises:
        RegistryError: unknown, broken, or not a subclass of `AgentLoop`.
        ConfigError: the file is missing, or does not define the class.
    """
    agent = load_reference(reference, folder, AGENTS, key=key, modules=modules)
    name = clean(repr(reference), 200)
    if not (isinstance(agent, type) and issubclass(agent, AgentLoop)):
        raise RegistryError(f"agent {name} is {agent!r}, not a subclass of agentloop.AgentLoop", "subclass it")
    if inspect.isabstract(agent):
        raise RegistryError(f"agent {name}: {agent.__name__} is abstract", "write its method run()")
    if not inspect.iscoroutinefunction(agent.run):
        raise RegistryError(f"agent {name}: {agent.__name__}.run() is not an `async def`", "make it one")
    return agent


def list_agents() -> list[tuple[str, str, str]]:
    """Return (name, reference, first line of the docstring) of every registered agent loop."""
    rows = []
    for name, entry in registered(AGENTS).items():
        try:
            summary = (load_agent(name).__doc__ or "").strip().splitlines()
            rows.append((name, entry.value, summary[0] if summary else ""))
        except RegistryError as exc:
            rows.append((name, entry.value, f"BROKEN: {exc.message}"))
    return rows
