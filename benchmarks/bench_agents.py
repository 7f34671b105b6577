"""The agent loop of `step.py`'s scenarios with given lengths, registered for the time of a run by `ours.py`."""

from __future__ import annotations

from agentloop import AgentLoop, Episode


class ForcedLengthAgent(AgentLoop):
    """One turn of exactly the length that the row gives this sample, whatever the model wants to end."""

    async def run(self, episode: Episode) -> None:
        length = episode.task.extra_info["lengths"][episode.sample_index]
        await episode.generate(max_new_tokens=length, ignore_eos=True)
