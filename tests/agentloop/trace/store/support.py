"""Trajectories for the tests of the store."""

from __future__ import annotations

import random
from typing import Any

from agentloop.trace.record import TraceRecord
from agentloop.types import EpisodeStatus, StopReason, Trajectory, Turn


def trajectory(
    rng: random.Random, *, group: str = "g0", sample: int = 0, tokens: int = 60, version: int = 3, **extra: Any
) -> Trajectory:
    """A lawful trajectory of two turns with text between them."""
    prompt, first, between = tokens // 3, tokens // 2, tokens // 2 + tokens // 6
    mask = [int(prompt <= i < first or i >= between) for i in range(tokens)]
    texts = [" ".join(rng.choice(["sum", "of", "tool", "is"]) for _ in range(6)) for _ in range(2)]
    return Trajectory(
        **{
            "token_ids": [rng.randrange(150_000) for _ in range(tokens)],
            "loss_mask": mask,
            "logprobs": [-rng.randrange(1, 4096) / 1024 if m else None for m in mask],
            "versions": [(version - (i < first) if m else None) for i, m in enumerate(mask)],
            "prompt_length": prompt,
            "turns": [
                Turn(prompt, first, texts[0], StopReason.STOP, request_id="r0"),
                Turn(between, tokens, texts[1], StopReason.LENGTH, request_id="r1", order=1),
            ],
            "messages": [{"role": "user", "content": "Question?"}, {"role": "assistant", "content": texts[0]}],
            "reward": float(rng.random() < 0.5),
            "group_id": group,
            "sample_index": sample,
            "task_id": f"row-{group}",
            "agent_name": "tool_agent",
            "metrics": {"reward_s": rng.random()},
            **extra,
        }
    )


def step_records(
    step: int, *, groups: int = 4, samples: int = 2, tokens: int = 60, failed: set[tuple[int, int]] = frozenset()
) -> list[TraceRecord]:  # type: ignore[assignment]
    """The records of a training step; `failed` names (group, sample) of failed episodes."""
    rng = random.Random(step)
    records = []
    for group in range(groups):
        for sample in range(samples):
            extra: dict[str, Any] = {}
            if (group, sample) in failed:
                extra = {"status": EpisodeStatus.FAILED, "reward": None, "error": "server lost"}
            made = trajectory(rng, group=f"g{group}", sample=sample, tokens=tokens, version=step, **extra)
            records.append(TraceRecord(step, "train", step - 1, 0, 1, made, row=group))
    return records
