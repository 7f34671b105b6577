"""A small recorded run: forks, examples, malformed calls, failures, hostile text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson
from typer.testing import CliRunner, Result

from agentloop.commands.main import build_app
from agentloop.trace.record import TraceRecord
from agentloop.trace.store import TraceStore
from agentloop.types import (
    EpisodeStatus,
    MalformedCall,
    Message,
    Span,
    StepReward,
    StopReason,
    ToolCall,
    Trajectory,
    Turn,
)

HOSTILE = "<script>alert(1)</script>\x1b[31mred\x1b]0;title\x07 \u202egnp.exe [bold]not markup[/bold] :smile:"

TOOLS = """
tools:
  - class_name: tools.calculator.Calculator
    tool_schema:
      type: function
      function:
        name: calculator
        description: Evaluate an arithmetic expression.
        parameters:
          type: object
          properties: {expression: {type: string, description: For example 12 * 3.}}
          required: [expression]
"""


def record(step: int, group: int, sample: int, *, split: str = "train", answer: str = "12") -> TraceRecord:
    """An episode of two turns: a call, its result, an answer. The sample's number is its reward."""
    prompt, first, seen, second = 6, 5, 4, 3
    length = prompt + first + seen + second
    mask = [0] * prompt + [1] * first + [0] * seen + [1] * second
    call = {"expression": f"{group} + {step}"}
    messages: list[Message] = [
        {"role": "system", "content": "Answer with the number."},
        {"role": "user", "content": f"What is {group} + {step}?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "I shall compute it.",
            "tool_calls": [{"type": "function", "id": "c0", "function": {"name": "calculator", "arguments": call}}],
        },
        {"role": "tool", "name": "calculator", "content": str(group + step), "tool_call_id": "c0"},
        {"role": "assistant", "content": f"#### {answer}"},
    ]
    turns = [
        Turn(
            prompt,
            prompt + first,
            "",
            StopReason.STOP,
            [ToolCall("calculator", call, "c0")],
            reasoning="I shall compute it.",
            latency_s=0.25,
            request_id="r0",
        ),
        Turn(
            length - second,
            length,
            f"#### {answer}",
            StopReason.STOP,
            latency_s=0.5,
            request_id="r1",
            cached_tokens=11,
        ),
    ]
    begin = 1_700_000_000_000_000_000 + step * 10**9
    root = "a" * 16
    spans = [
        Span("episode", root, None, begin, begin + 10**9, attributes={"step": step}),
        Span("turn", "b" * 16, root, begin, begin + 3 * 10**8, attributes={"request_id": "r0"}),
        Span("generate", "c" * 16, "b" * 16, begin, begin + 2 * 10**8, attributes={"request_id": "r0"}),
        Span("tool", "d" * 16, root, begin + 3 * 10**8, begin + 4 * 10**8, attributes={"tool": "calculator"}),
        Span("turn", "e" * 16, root, begin + 4 * 10**8, begin + 10**9, attributes={"request_id": "r1"}),
    ]
    trajectory = Trajectory(
        token_ids=list(range(100, 100 + length)),
        loss_mask=mask,
        logprobs=[-0.125 * (i % 5) if m else None for i, m in enumerate(mask)],
        versions=[step - 1 if m else None for m in mask],
        prompt_length=prompt,
        turns=turns,
        reward=float(sample),
        reward_parts={"format": 0.5, "calculator": 0.25},
        outcome=float(sample),
        answer=answer,
        step_rewards=[StepReward("calculator", 0.25, prompt, prompt + first)],
        agent_name="tool_agent",
        task_id=f"row{group}",
        group_id=f"g{step}-{group}",
        sample_index=sample,
        messages=messages,
        metrics={"tool_calls": 1.0, "turns": 2.0},
        trace_id="f" * 32,
        spans=spans,
    )
    numbers = np.array([-0.125 * (i % 5) - 0.01 if m else np.nan for i, m in enumerate(mask)], np.float32)
    return TraceRecord(
        step,
        split,
        step - 1,
        0,
        1,
        trajectory,
        advantages=np.where(mask, 0.5, 0).astype(np.float32),
        trainer_logprobs=numbers,
        row=group,
    )


def with_fork(main: TraceRecord) -> list[TraceRecord]:
    """The episode of a record with a fork: two trajectories, the main one last."""
    fork = record(main.step, int(main.trajectory.group_id.split("-")[1]), main.trajectory.sample_index)
    fork.trajectory.spans, fork.parts, main.parts, main.part = [], 2, 2, 1
    return [fork, main]


def failed(made: TraceRecord, error: str = "ToolError: the service is down") -> TraceRecord:
    t = made.trajectory
    t.status, t.reward, t.outcome, t.error, t.answer = EpisodeStatus.FAILED, None, None, error, None
    return made


def cut(made: TraceRecord) -> TraceRecord:
    """The last turn ran out of tokens; the first has a malformed call."""
    made.trajectory.turns[-1].stop_reason = made.trajectory.stop_reason = StopReason.LENGTH
    made.trajectory.turns[0].malformed_calls = [MalformedCall("calculator(", "not JSON")]
    return made


def with_example(made: TraceRecord) -> TraceRecord:
    """The prompt has an answer that nobody sampled."""
    example: list[Message] = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "#### 2"}]
    made.trajectory.messages[1:1] = example
    return made


def write_run(folder: Path, steps: int = 3, groups: int = 3, samples: int = 2) -> Path:
    """Write a run: the last group of the last step has a failed, a forked and a hostile episode."""
    (folder / "config").mkdir(parents=True, exist_ok=True)
    (folder / "tools.yaml").write_text(TOOLS)
    config: dict[str, Any] = {
        "run": {"name": "small"},
        "model": {"path": str(folder / "model")},
        "tools": str(folder / "tools.yaml"),
    }
    (folder / "config" / "resolved.json").write_bytes(orjson.dumps(config))
    store = TraceStore(folder)
    for step in range(1, steps + 1):
        records = [record(step, group, sample) for group in range(groups) for sample in range(samples)]
        if step == steps:
            records[-1:] = with_fork(records[-1])
            hostile = record(step, groups, 0, answer=HOSTILE)
            records += [hostile, failed(record(step, groups, 1))]
        store.write(step, "train", records)
    store.write(steps, "eval", [record(steps, 0, 0, split="eval")])
    return folder


def command(*words: object) -> Result:
    """Run `agentloop trace` with some words; an error is in `exception`."""
    return CliRunner().invoke(build_app(), ["trace", *map(str, words)])
