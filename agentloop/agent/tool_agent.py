"""`tool_agent`: generate, run the tool calls, repeat; ends when nothing answers a turn."""

from __future__ import annotations

from agentloop.agent.base import AgentLoop
from agentloop.episode.episode import Episode
from agentloop.types import StopReason


class ToolAgent(AgentLoop):
    """Offer the recipe's tools. Malformed calls get an error, which the model can correct.

    A turn without a call goes to the row's interaction, if it has one; the episode ends when the
    interaction is done.
    """

    async def run(self, episode: Episode) -> None:
        while True:
            turn = await episode.generate()
            if turn.stop_reason is not StopReason.STOP:
                # Judge a truncated turn too: running out of tokens must not avoid a bad reward.
                await episode.respond()
                return

            if not (turn.tool_calls or turn.malformed_calls):
                if not await episode.respond():
                    return
                continue

            episode.check_budget()  # end here if no turn is left to read the results
            if turn.tool_calls:
                await episode.call_tools(turn.tool_calls)
            episode.answer_malformed(turn)
