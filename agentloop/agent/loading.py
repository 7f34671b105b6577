"""Load agent loops by the name in a row's `agent_name` column."""

from __future__ import annotations

import inspect

from agentloop.agent.base import AgentLoop
from agentloop.errors import RegistryError
from agentloop.registry import AGENTS, load, registered


def load_agent(name: str) -> type[AgentLoop]:
    """Load the agent loop registered as `name`.

    Raises:
        RegistryError: unknown, broken, or not a subclass of `AgentLoop`.
    """
    agent = load(AGENTS, name)
    if not (isinstance(agent, type) and issubclass(agent, AgentLoop)):
        raise RegistryError(f"agent {name!r} is {agent!r}, not a subclass of agentloop.AgentLoop", "subclass it")
    if inspect.isabstract(agent):
        raise RegistryError(f"agent {name!r}: {agent.__name__} is abstract", "write its method run()")
    if not inspect.iscoroutinefunction(agent.run):
        raise RegistryError(f"agent {name!r}: {agent.__name__}.run() is not an `async def`", "make it one")
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
