"""Agent loops with fixed lengths and waits, registered for one run by `ours.install_agents`."""

from __future__ import annotations

import asyncio

from agentloop import AgentLoop, Episode


class ForcedLengthAgent(AgentLoop):
    """Generate one turn of exactly the length that the row gives for this sample, ignoring end
    tokens."""

    async def run(self, episode: Episode) -> None:
        length = episode.task.extra_info["lengths"][episode.sample_index]
        await episode.generate(max_new_tokens=length, ignore_eos=True)


class SlowToolAgent(AgentLoop):
    """Generate two turns of fixed lengths, with a tool between them that answers after the row's
    delay.

    The row's `extra_info`: `turns` (two lengths a sample), `waits_s` (seconds a sample),
    `tool_text`.
    """

    async def run(self, episode: Episode) -> None:
        facts = episode.task.extra_info
        first, second = facts["turns"][episode.sample_index]
        await episode.generate(max_new_tokens=first, ignore_eos=True)
        await asyncio.sleep(facts["waits_s"][episode.sample_index])
        episode.observe({"role": "user", "content": facts["tool_text"]})
        await episode.generate(max_new_tokens=second, ignore_eos=True)
