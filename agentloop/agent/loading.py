"""Agent loops by the name that a row's `agent_name` column gives them."""

from __future__ import annotations

import inspect

from agentloop.agent.base import AgentLoop
from agentloop.errors import RegistryError
from agentloop.registry import AGENTS, load, registered


def load_agent(name: str) -> type[AgentLoop]:
    """The agent loop registered as `name`.

    Raises:
        RegistryError: unknown, broken, or no subclass of `AgentLoop`.
    """
    agent = load(AGENTS, name)
    if not (isinstance(agent, type) and issubclass(agent, AgentLoop)):
        raise RegistryError(f"agent {name!r} is {agent!r}, no subclass of agentloop.AgentLoop", "subclass it")
    if inspect.isabstract(agent):
        raise RegistryError(f"agent {name!r}: {agent.__name__} does not say what it does", "write its method run()")
    return agent


def list_agents() -> list[tuple[str, str, str]]:
    """(name, where it is, first line of its docstring) of every registered agent loop."""
    rows = []
    for name, entry in registered(AGENTS).items():
        try:
            summary = (load_agent(name).__doc__ or "").strip().splitlines()
            rows.append((name, entry.value, summary[0] if summary else ""))
        except RegistryError as exc:
            rows.append((name, entry.value, f"BROKEN: {exc.message}"))
    return rows
