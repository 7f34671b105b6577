"""`tool_agent`: generate, call the tools that were asked for, go on until the model answers and nobody answers it."""

from __future__ import annotations

from agentloop.agent.base import AgentLoop
from agentloop.episode.episode import Episode
from agentloop.types import StopReason


class ToolAgent(AgentLoop):
    """Offers the recipe's tools; malformed calls are answered, so that the model can mend them.

    A turn without a call goes to the row's interaction, where it has one; the episode ends when that is done.
    """

    async def run(self, episode: Episode) -> None:
        while True:
            turn = await episode.generate()
            if turn.stop_reason is not StopReason.STOP:
                # A turn that was cut is judged too: running out of tokens is no way around a bad reward.
                await episode.respond()
                return
            if not (turn.tool_calls or turn.malformed_calls):
                if not await episode.respond():
                    return
                continue
            episode.check_budget()  # nobody would read the results of calls that are run now
            if turn.tool_calls:
                await episode.call_tools(turn.tool_calls)
            episode.answer_malformed(turn)
