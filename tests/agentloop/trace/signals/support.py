"""Runs as signals see them: metrics rows and records, planted or healthy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from agentloop.trace.record import TraceRecord
from agentloop.trace.signals import Signal, judge
from agentloop.trace.signals.evidence import WIDTH, Evidence
from agentloop.trace.signals.facts import facts_of
from agentloop.types import EpisodeStatus, Span, StopReason, ToolCall, Trajectory, Turn

GROUPS, SAMPLES, STEPS = 10, 4, 20

Change = Callable[[TraceRecord, int, int, int], None]
"""(record, step, group, sample): changes a record in place."""


def record(step: int, group: int, sample: int) -> TraceRecord:
    """An ordinary episode: one tool call that depends on the task, an answer, a reward of 0 or 1."""
    rng = np.random.default_rng(step * 10_000 + group * 100 + sample)
    prompt, first, second = 10, 30, 30
    length = prompt + first + 5 + second
    mask = [0] * prompt + [1] * first + [0] * 5 + [1] * second
    logprobs = rng.normal(-0.5, 0.1, length)
    task = f"row{step % 7}-{group}"
    good = bool(rng.random() < 0.5)
    value = group * 31 + step if good else int(rng.integers(1000))
    turns = [
        Turn(prompt, prompt + first, f"call {task}", StopReason.STOP, [ToolCall("calc", {"x": task}, f"c{sample}")]),
        Turn(length - second, length, f"#### {value}", StopReason.STOP),
    ]
    trajectory = Trajectory(
        token_ids=list(rng.integers(5, 500, length)),
        loss_mask=mask,
        logprobs=[float(p) if m else None for p, m in zip(logprobs, mask, strict=True)],
        versions=[step - 1 if m else None for m in mask],
        prompt_length=prompt,
        turns=turns,
        reward=float(good),
        reward_parts={"format": 1.0, "correct": float(good)},
        outcome=float(good),
        answer=str(value),
        agent_name="tool_agent",
        task_id=task,
        group_id=f"{step}-{group}",
        sample_index=sample,
        metrics={"tool_calls": 1, "tool_errors": 0},
        spans=[Span("tool", f"{sample:016x}", "0" * 16, 0, 1_000_000, attributes={"tool": "calc"})],
    )
    theirs = np.where(mask, logprobs + rng.normal(0, 1e-5, length), np.nan).astype(np.float32)
    return TraceRecord(step, "train", step - 1, 0, 1, trajectory, trainer_logprobs=theirs)


def row(step: int, **changes: Any) -> dict[str, Any]:
    """An ordinary line of metrics.jsonl: the reward rises slowly."""
    return {
        "step": step,
        "version": step,
        "reward/mean": 0.3 + 0.02 * step,
        "reward/std": 0.45,
        "reward/zero_std_share": 0.2,
        "episode/count": GROUPS * SAMPLES,
        "episode/tool_calls_mean": 1.0,
        "episode/tool_errors_mean": 0.02,
        "episode/response_tokens_mean": 65.0 + step % 3,
        "mismatch/logprob_abs_mean": 1e-5,
        "staleness/max": 0,
        "stop/stop": GROUPS * SAMPLES,
    } | {key.replace("__", "/"): value for key, value in changes.items()}


def rows(count: int = STEPS, **columns: Callable[[int], Any]) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl; a column is a function of the step, `__` stands for `/`."""
    return [row(step, **{key: of(step) for key, of in columns.items()}) for step in range(1, count + 1)]


def run(
    change: Change = lambda record, step, group, sample: None,
    lines: Sequence[dict[str, Any]] | None = None,
    steps: int = STEPS,
) -> Evidence:
    """The evidence of a run whose records are changed one by one."""
    facts = []
    numbers = range(1, steps + 1)
    for step in sorted({*numbers[:WIDTH], *numbers[-WIDTH:]}):
        records = []
        for group in range(GROUPS):
            for sample in range(SAMPLES):
                made = record(step, group, sample)
                change(made, step, group, sample)
                records.append(made)
        facts.append(facts_of(step, records))
    return Evidence(rows(steps) if lines is None else lines, facts)


def is_late(step: int) -> bool:
    return step > STEPS - WIDTH


def fired(evidence: Evidence) -> dict[str, Signal]:
    return {signal.rule: signal for signal in judge(evidence)}


def failed(trajectory: Trajectory) -> Trajectory:
    return replace(trajectory, status=EpisodeStatus.FAILED, reward=None)
