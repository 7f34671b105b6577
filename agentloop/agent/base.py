"""`AgentLoop`: the base class of agents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentloop.episode.episode import Episode


class AgentLoop(ABC):
    """One agent. `run` is called once per sample and drives the episode to its end.

    Register a subclass through the entry-point group `agentloop.agents`; a row chooses it by
    `agent_name`.

    Args:
        options: `agents.<name>.options` of the recipe.
    """

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        self.options = options or {}

    @abstractmethod
    async def run(self, episode: Episode) -> None:
        """Drive one episode: `episode.generate()`, `episode.call_tools()`, `episode.observe()`.

        They raise `EpisodeEnd` when a budget is used up. Do not catch it; the runner does.
        """
