"""A small run with real tokens of the quickstart's tokenizer, without training one."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from agentloop.chat import load_tokenizer
from agentloop.faults import Fault
from agentloop.trace.record import TraceRecord
from agentloop.trace.store import TraceStore
from agentloop.types import EpisodeStatus, Span, StepReward, StopReason, ToolCall, Trajectory, Turn

HOSTILE = "<script>alert(1)</script> \x1b[31mred \u202eleft"


def episode(tokenizer: Any, group: str, sample: int, *, task: int, version: int, **extra: Any) -> Trajectory:
    """An episode of two turns with a tool call between them: the prompt asks for task + sample."""
    call = {"expression": f"{task}+{sample}"}
    texts = {
        "prompt": f"<|im_start|>user\nWhat is {task}+{sample}?<|im_end|>\n<|im_start|>assistant\n",
        "first": "I use the tool. é",
        "tool": f"<|im_end|>\n<|im_start|>tool\n{task + sample}<|im_end|>\n<|im_start|>assistant\n",
        "last": f"The answer is {task + sample}",
    }
    ids, mask, spans = [], [], {}
    for name, text in texts.items():
        new = tokenizer.encode(text, add_special_tokens=False)
        spans[name] = (len(ids), len(ids) + len(new))
        ids += new
        mask += [int(name in ("first", "last"))] * len(new)
    calls = [ToolCall("calculator", call, "c0")]
    fields: dict[str, Any] = {
        "token_ids": ids,
        "loss_mask": mask,
        "logprobs": [-0.5 if m else None for m in mask],
        "versions": [version if m else None for m in mask],
        "prompt_length": spans["prompt"][1],
        "turns": [
            Turn(*spans["first"], texts["first"], StopReason.STOP, calls, latency_s=0.25, request_id="e/0"),
            Turn(*spans["last"], texts["last"], StopReason.STOP, latency_s=0.5, request_id="e/1", order=1),
        ],
        "messages": [
            {"role": "user", "content": f"What is {task}+{sample}?"},
            {
                "role": "assistant",
                "content": texts["first"],
                "tool_calls": [{"type": "function", "id": "c0", "function": {"name": "calculator", "arguments": call}}],
            },
            {"role": "tool", "name": "calculator", "tool_call_id": "c0", "content": str(task + sample)},
            {"role": "assistant", "content": texts["last"]},
        ],
        "reward": float(sample % 2),
        "reward_parts": {"correct": float(sample % 2), "format": 0.1},
        "step_rewards": [StepReward("calculator", 0.1, *spans["first"])],
        "answer": str(task + sample),
        "agent_name": "tool_agent",
        "task_id": f"task-{task}",
        "data_source": "sums",
        "group_id": group,
        "sample_index": sample,
        "metrics": {"generate_s": 0.75, "tool_s": 0.1, "tool_errors": 0.0},
        "trace_id": "a" * 32,
        "spans": [
            Span("episode", "1" * 16, None, 10**18, 10**18 + 10**9),
            Span("tool", "2" * 16, "1" * 16, 10**18 + 10**8, 10**18 + 2 * 10**8, attributes={"call_id": "c0"}),
        ],
    }
    return Trajectory(**{**fields, **extra})


def record(step: int, trajectory: Trajectory, *, part: int = 0, parts: int = 1, split: str = "train") -> TraceRecord:
    """The record of a trajectory that was trained one version later than it was sampled."""
    mask = np.array(trajectory.loss_mask) == 1
    return TraceRecord(
        step, split, step, part, parts, trajectory,
        advantages=np.where(mask, 0.5, 0).astype(np.float32),
        trainer_logprobs=np.where(mask, -0.25, np.nan).astype(np.float32),
        row=7,
    )  # fmt: skip


def write_step(run: Path, step: int, model: Path, *, groups: int = 2, samples: int = 4) -> None:
    """Write the trace and the metrics of a step; in its last group, the last sample failed."""
    tokenizer = load_tokenizer(str(model))
    records = []
    for group in range(groups):
        for sample in range(samples):
            extra: dict[str, Any] = {}
            if (group, sample) == (groups - 1, samples - 1):
                error = f"ServerError: replica {step} is gone"
                fault = Fault("the tool calculator", "ValueError: bad", "tool.py:3", 'File "tool.py", line 3')
                extra = {"status": EpisodeStatus.FAILED, "reward": None, "error": error, "faults": [fault]}
            name = f"train/{step}/{group}"
            made = episode(tokenizer, name, sample, task=group, version=step - 1, **extra)
            records.append(record(step, made))
    TraceStore(run).write(step, "train", records)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(orjson.dumps({"step": step, "reward/mean": 0.1 * step, "train/loss": 1.0}) + b"\n")


def make_run(run: Path, model: Path, steps: int = 3) -> Path:
    """Write a run directory that ended after some steps."""
    (run / "config").mkdir(parents=True)
    config = {"run": {"name": run.name, "steps": 5}, "model": {"path": str(model)}, "rollout": {"engine": "torch"}}
    (run / "config" / "resolved.json").write_bytes(orjson.dumps({**config, "trainer": {"hub_token": "geheim"}}))
    for step in range(1, steps + 1):
        write_step(run, step, model)
    return run


def png() -> str:
    """A small image as messages hold it."""
    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (2, 2), "red").save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
