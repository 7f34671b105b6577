"""An agent that is asked once whether it is sure."""

from agentloop import AgentLoop, Episode

QUESTION = "Are you sure?"


class SecondThoughtAgent(AgentLoop):
    """Answers, is asked whether it is sure, and answers again; tools may be used both times."""

    async def run(self, episode: Episode) -> None:
        for attempt in range(2):
            turn = await episode.generate()
            if turn.tool_calls:
                await episode.call_tools(turn.tool_calls)
                await episode.generate()
            if attempt == 0:
                episode.observe({"role": "user", "content": QUESTION})
