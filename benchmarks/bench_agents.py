"""The agent of `benchmarks/step.py`: generates as many tokens as its row says for this sample."""

from __future__ import annotations

from agentloop import AgentLoop, Episode


class ForcedLengthAgent(AgentLoop):
    """One turn of a given length, whatever the model wants to end."""

    async def run(self, episode: Episode) -> None:
        length = episode.task.extra_info["lengths"][episode.sample_index]
        await episode.generate(max_new_tokens=length, ignore_eos=True)
