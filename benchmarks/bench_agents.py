"""Agent loops with fixed lengths and waits, registered for one run by `ours.install_agents`."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from agentloop import AgentLoop, Episode


class ForcedLengthAgent(AgentLoop):
    """Generate one turn of exactly the length that the row gives for this sample, ignoring end
    tokens."""

    async def run(self, episode: Episode) -> None:
        length = episode.task.extra_info["lengths"][episode.sample_index]
        await episode.generate(max_new_tokens=length, ignore_eos=True)


class FirstTokenAgent(AgentLoop):
    """Generate one token, and write the time of the run's first one into the file `BENCH_FIRST`."""

    async def run(self, episode: Episode) -> None:
        await episode.generate(max_new_tokens=1)
        first = Path(os.environ["BENCH_FIRST"])
        if not first.exists():
            first.write_text(str(time.time()), encoding="utf-8")


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
