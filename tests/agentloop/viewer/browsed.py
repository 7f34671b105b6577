"""A run with everything that the viewer can show: hostile text, images, forks, failures, an evaluation."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from agentloop.chat import load_tokenizer
from agentloop.faults import Fault
from agentloop.trace.record import TraceRecord
from agentloop.trace.store import TraceStore
from agentloop.types import EpisodeStatus, MalformedCall, Span, StepReward, StopReason, Trajectory
from tests.agentloop.viewer.api.material import episode, png, record

STEPS = 6
GROUPS = 3
SAMPLES = 4
BROKEN = 3
"""The sample whose tool call failed."""

LONG = 64_000
"""Tokens of the long episode."""

HOSTILE = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked=2'> \x1b[31mred\x1b[0m \x07 "
    "\u202eevil\u202c \u2066isolated"
)
SECOND = 10**9


def spans(sample: int) -> list[Span]:
    """Two turns, a tool call between them and a reward at the end; times differ by sample."""
    rows = [
        ("episode", 0, 40, None, {}),
        ("turn", 0, 12, 0, {"request_id": "e/0"}),
        ("generate", 0, 11, 1, {"request_id": "e/0"}),
        ("parse", 11, 12, 1, {}),
        ("tool", 13, 18 + sample, 0, {"tool": "calculator", "call_id": "c0"}),
        ("turn", 20 + sample, 34, 0, {"request_id": "e/1"}),
        ("generate", 20 + sample, 33, 5, {"request_id": "e/1"}),
        ("reward", 34, 40, 0, {"reward": "reward"}),
        ("lookup", 14, 15, 4, {"table": "orders", "depth": 2}),
    ]
    begin = 1_790_000_000 * SECOND
    made = [
        Span(name, f"{i:016x}", None if parent is None else f"{parent:016x}", begin + start * SECOND // 20,
             begin + end * SECOND // 20, attributes=attributes)
        for i, (name, start, end, parent, attributes) in enumerate(rows)
    ]  # fmt: skip
    if sample == BROKEN:
        made[4].status, made[4].error = "error", "RuntimeError: minus is \x1b[31mbroken"
    return made


def trace_id(run: str, step: int, group: str, sample: int) -> str:
    """The id of an episode's trace: another one for each episode of each run."""
    return hashlib.sha256(f"{run} {step} {group} {sample}".encode()).hexdigest()[:32]


def shown_episode(tokenizer: Any, step: int, group: int, sample: int) -> Trajectory:
    """An episode that was sampled one version before its step; which are odd is said below."""
    extra: dict[str, Any] = {"spans": spans(sample), "step_rewards": [StepReward("used the tool", 0.1, 0, 0)]}
    if (group, sample) == (2, 3):
        extra |= {"status": EpisodeStatus.FAILED, "reward": None, "error": f"ServerError: replica {step % 2} is gone"}
        frames = '  File "/mine/agent.py", line 3, in run'
        extra["faults"] = [Fault("the agent planner", "KeyError: \x1b[31mboom", "/mine/agent.py:3", frames)]
    if (group, sample) == (2, 2):
        error = "turn 2: the prompt is not the trajectory so far"
        extra |= {"status": EpisodeStatus.REJECTED, "error": error, "broken_rule": "prefix"}
    made = episode(tokenizer, f"g{group}", sample, task=group, version=step - 1, **extra)
    first = made.turns[0]
    made.step_rewards = [StepReward("used the tool", 0.1, first.start, first.end)]
    rng = np.random.default_rng(step * 100 + group * 10 + sample)
    made.logprobs = [None if one is None else -float(rng.exponential(0.6)) for one in made.logprobs]
    if sample == BROKEN:
        made.metrics["tool_errors"] = 1.0
    if (group, sample) == (0, 0):
        made.messages[2]["content"] = HOSTILE
        made.answer = HOSTILE
    if (group, sample) == (0, 1):
        made.messages[0]["content"] = [{"type": "image", "image": png()}, {"type": "text", "text": "What is this?"}]
        made.messages[1]["reasoning_content"] = "The picture is red; I check it."
    if (group, sample) == (0, 2):
        made.turns[0].malformed_calls = [MalformedCall('{"name": "calc', "the JSON ends too soon")]
        made.turns[1].stop_reason = made.stop_reason = StopReason.LENGTH
    return made


def shown_record(step: int, trajectory: Trajectory) -> TraceRecord:
    made = record(step, trajectory)
    mask = np.array(trajectory.loss_mask) == 1
    own = np.array([np.nan if one is None else one for one in trajectory.logprobs])
    rng = np.random.default_rng(step)
    made.trainer_logprobs = np.where(mask, own + rng.normal(0, 0.02, len(own)), np.nan).astype(np.float32)
    sign = 1 if (trajectory.reward or 0) > 0.5 else -1
    made.advantages = np.where(mask, 0.87 * sign, 0).astype(np.float32)
    return made


def write_step(run: Path, step: int, tokenizer: Any) -> None:
    """Write the traces and the line of metrics of one step."""
    made = [shown_episode(tokenizer, step, group, sample) for group in range(GROUPS) for sample in range(SAMPLES)]
    for one in made:
        one.trace_id = trace_id(run.name, step, one.group_id, one.sample_index)
    TraceStore(run).write(step, "train", [shown_record(step, one) for one in made])
    row = {
        "step": step, "reward/mean": 0.2 + 0.1 * step, "episode/turns_mean": 2.0, "episode/tool_calls_mean": 1.0,
        "episode/response_tokens_mean": 40.0 + step, "mismatch/logprob_abs_mean": 1e-3 / step, "step/time_s": 2.0,
        "train/entropy": 1.0 / step, "train/grad_norm": 1.0, "staleness/max": 1.0,
    }  # fmt: skip
    if step % 3 == 0:
        row["eval/reward_mean"] = 0.1 * step
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(orjson.dumps(row) + b"\n")


def write_long(run: Path, tokenizer: Any) -> str:
    """Write an evaluation of one episode of 64,000 tokens; return its key."""
    made = episode(tokenizer, "long", 0, task=9, version=STEPS)
    rng = np.random.default_rng(0)
    more = LONG - len(made.token_ids)
    made.token_ids = [*made.token_ids, *(int(one) for one in rng.integers(0, 300, more))]
    mask = [int(i % 3000 < 2000) for i in range(more)]
    made.loss_mask = [*made.loss_mask, *mask]
    made.logprobs = [*made.logprobs, *(-float(rng.exponential(1.0)) if one else None for one in mask)]
    made.versions = [*made.versions, *(3 if one else None for one in mask)]
    kept = shown_record(STEPS, made)
    kept.split = "eval"
    TraceStore(run).write(STEPS, "eval", [kept])
    return kept.key


def make_browsed_run(run: Path, model: Path) -> str:
    """Write the run; return the key of its long episode."""
    (run / "config").mkdir(parents=True)
    config = {
        "run": {"name": run.name, "steps": 10}, "model": {"path": str(model)},
        "trainer": {"algorithm": {"advantage": "grpo"}}, "rollout": {"engine": "torch"},
    }  # fmt: skip
    (run / "config" / "resolved.json").write_bytes(orjson.dumps(config))
    tokenizer = load_tokenizer(str(model))
    for step in range(1, STEPS + 1):
        write_step(run, step, tokenizer)
    return write_long(run, tokenizer)
