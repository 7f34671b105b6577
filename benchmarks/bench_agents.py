"""Agent loops with given lengths and waits, registered for the time of a run by `ours.install_agents`."""

from __future__ import annotations

import asyncio

from agentloop import AgentLoop, Episode


class ForcedLengthAgent(AgentLoop):
    """One turn of exactly the length that the row gives this sample, whatever the model wants to end."""

    async def run(self, episode: Episode) -> None:
        length = episode.task.extra_info["lengths"][episode.sample_index]
        await episode.generate(max_new_tokens=length, ignore_eos=True)


class SlowToolAgent(AgentLoop):
    """Two turns of given lengths, and between them a tool: it answers after the seconds that the row gives this sample.

    The row's `extra_info`: `turns` (for each sample its two lengths), `waits_s` (for each sample), `tool_text`.
    """

    async def run(self, episode: Episode) -> None:
        facts = episode.task.extra_info
        first, second = facts["turns"][episode.sample_index]
        await episode.generate(max_new_tokens=first, ignore_eos=True)
        await asyncio.sleep(facts["waits_s"][episode.sample_index])
        episode.observe({"role": "user", "content": facts["tool_text"]})
        await episode.generate(max_new_tokens=second, ignore_eos=True)
