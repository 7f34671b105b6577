"""`single_turn_agent`: one prompt, one answer."""

from __future__ import annotations

from agentloop.agent.base import AgentLoop
from agentloop.episode.episode import Episode


class SingleTurnAgent(AgentLoop):
    """Answer once; no tools are offered."""

    async def run(self, episode: Episode) -> None:
        episode.tools = None
        await episode.generate()
