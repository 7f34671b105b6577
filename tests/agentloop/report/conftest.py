"""A run directory of 30 steps as a real one leaves it, killed at the end, with the worst content a model can write."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HOSTILE = [
    "<script>window.hacked = 1</script>",
    "]]>",
    "</script><img src=x onerror=window.hacked=2>",
    "[bold red]markup[/]",
    "🧮",
    "\ud800",
    "\x1b[31m",
    "\u202e",
    "{{ 7 * 7 }}",
]

Line = dict[str, Any]


def trajectory(
    question: str, *, reward: float | None, tool: bool, version: int, rng: random.Random, **extra: Any
) -> Line:
    """A trace line of one episode, with pieces: the prompt, then one or two turns."""
    a, b = rng.randint(100, 999), rng.randint(10, 99)
    parts: list[tuple[str, bool]] = []
    turns: list[Line] = []

    def show(*pieces: str) -> None:
        parts.extend((piece, False) for piece in pieces)

    def speak(*pieces: str) -> None:
        turn = {"start": len(parts), "end": len(parts) + len(pieces), "text": "".join(pieces), "stop_reason": "stop"}
        turns.append(turn | {"tool_calls": [], "malformed_calls": [], "cached_tokens": 0, "latency_s": 0.1})
        parts.extend((piece, True) for piece in pieces)

    show("<|im_start|>", "system", "\n", "Answer with #### and the number.", "<|im_end|>", "\n", "<|im_start|>", "user")
    show("\n", question, f" {a}", " *", f" {b}", "?", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n")
    prompt_length = len(parts)
    if tool:
        opening = ("<tool_call>", "\n", '{"name": "', "calculator", '", "arguments": {"expression": "')
        speak(*opening, *str(a), " *", f" {b}", '"}}', "\n", "</tool_call>", "<|im_end|>")
        show("\n", "<|im_start|>", "user", "\n", "<tool_response>", "\n", str(a * b), "\n", "</tool_response>")
        show("<|im_end|>", "\n", "<|im_start|>", "assistant", "\n")
    speak("####", " ", *(str(a * b) if reward else str(rng.randint(1000, 99999))), "<|im_end|>")
    pieces = [piece for piece, _ in parts]
    mask = [int(sampled) for _, sampled in parts]
    return {
        "format": 1,
        "token_ids": [rng.randint(0, 383) for _ in parts],
        "loss_mask": mask,
        "logprobs": [-rng.expovariate(4) if m else None for m in mask],
        "versions": [version if m else None for m in mask],
        "prompt_length": prompt_length,
        "turns": turns,
        "reward": reward,
        "reward_parts": {},
        "stop_reason": "stop",
        "status": "ok",
        "error": None,
        "agent_name": "tool_agent",
        "task_id": f"row-{rng.randint(0, 5000)}",
        "group_id": "g0",
        "sample_index": 0,
        "data_source": "arithmetic",
        "messages": [],
        "metrics": {"tool_calls": float(tool)},
        "pieces": pieces,
        **extra,
    }


def with_pieces(line: Line, pieces: list[str]) -> Line:
    """`line` with more sampled pieces at its end."""
    line["token_ids"] += [7] * len(pieces)
    line["loss_mask"] += [1] * len(pieces)
    line["logprobs"] += [-0.01] * len(pieces)
    line["versions"] += [1] * len(pieces)
    line["pieces"] += pieces
    return line


def write_lines(path: Path, lines: list[Line], torn: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn, encoding="utf-8")


def metrics_row(step: int, steps: int, rng: random.Random) -> Line:
    p = 0.31 + 0.63 / (1 + math.exp(-(step - steps * 0.4) / (steps * 0.11))) + rng.gauss(0, 0.015)
    row: Line = {
        "step": step,
        "version": step,
        "reward/mean": p,
        "reward/std": math.sqrt(max(0.0, p * (1 - p))),
        "episode/count": 256,
        "episode/turns_mean": 1.3 + 0.68 * p,
        "episode/tool_calls_mean": min(1.0, p * 1.06),
        "episode/tool_errors_mean": max(0.0, 0.08 - 0.08 * p),
        "episode/response_tokens_mean": 17 + 24 * p,
        "episode/response_tokens_max": 58 + rng.randint(0, 9),
        "episode/failed": 2 * int(step == 7),
        "episode/rejected": int(step == 7),
        "rollout/tokens": 7000,
        "rollout/time_s": 0.8 + rng.gauss(0, 0.03),
        "rollout/tokens_per_s": 11000 + rng.gauss(0, 400),
        "rollout/wait_s": 0.9,
        "train/tokens": 21000,
        "train/tokens_per_s": 17500 + rng.gauss(0, 500),
        "train/time_s": 1.1 + rng.gauss(0, 0.05),
        "train/wait_s": 0.35 + abs(rng.gauss(0, 0.04)),
        "train/loss": rng.gauss(0, 0.01),
        "train/grad_norm": 0.6 + abs(rng.gauss(0, 0.2)),
        "train/entropy": 0.32 - 0.2 * p,
        "train/clip_frac": 0.03 * (1 - p) + abs(rng.gauss(0, 0.002)),
        "train/kl_ref": 0.0,
        "train/lr": 2e-4,
        "publish/time_s": 0.05,
        "step/time_s": 1.75,
        "mismatch/logprob_abs_mean": 2e-7 * (1 + rng.random()),
        "mismatch/k3": 3e-13 * (1 + rng.random()),
        "staleness/max": int(step % 4 == 0),
        "stop/stop": 256 - int(40 * (1 - p)),
        "stop/length": int(40 * (1 - p)),
    }
    if step % 10 == 0 or step == steps:
        row |= {"eval/reward_mean": min(1.0, p + 0.04), "eval/time_s": 0.7, "eval/response_tokens_mean": 16 + 24 * p}
    return row


CONFIG: Line = {
    "seed": 0,
    "run": {"name": "quick <b>start</b>", "steps": 30, "dir": None},
    "model": {"path": "/nowhere/recipes/quickstart/model", "dtype": "float32"},
    "rollout": {"engine": "torch", "group_size": 8, "batch_size": 32, "token": "hunter2", "sampling": {"top_p": 1.0}},
    "trainer": {"algorithm": {"advantage": "grpo", "loss": "ppo_clip"}, "tokens_per_micro_batch": 4096},
    "tools": "<script>alert(1)</script>",
}


def build_run(root: Path, steps: int = 30, *, hostile: bool = True) -> Path:
    """Write a run directory of `steps` steps."""
    rng = random.Random(0)
    rows: list[Line] = [{"step": 0, "version": 0, "eval/reward_mean": 0.05, "eval/time_s": 0.7}]
    rows += [metrics_row(step, steps, rng) for step in range(1, steps + 1)]
    if hostile:
        rows[5] |= {"train/entropy": float("nan"), "train/grad_norm": None, "reward/mean": None, "step/time_s": "soon"}
        rows[6] |= {"mismatch/logprob_abs_mean": 0.0, "mismatch/k3": float("inf"), "stop/</script>": 3}
    write_lines(root / "metrics.jsonl", rows, torn='{"step": 31, "reward/mean": 0.9' if hostile else "")
    for step in range(1, steps + 1):
        p = rows[step]["reward/mean"] or 0.3
        lines = []
        for index in range(16):
            good = rng.random() < p
            lines.append(
                trajectory("What is", reward=float(good), tool=good or rng.random() < 0.2, version=step - 1, rng=rng)
            )
            lines[-1]["sample_index"] = index
        if hostile and step in (1, steps):
            lines = [with_pieces(line, HOSTILE) for line in lines]
        if hostile and step == 7:
            for port in (8000, 8001):
                lines.append(trajectory("q", reward=None, tool=False, version=6, rng=rng, status="failed",
                                        error=f"no answer from <http://127.0.0.1:{port}>"))  # fmt: skip
            broken = trajectory("q", reward=None, tool=False, version=6, rng=rng, status="rejected",
                                error="logprobs has 3 entries for 9 token ids")  # fmt: skip
            lines.append(broken | {"logprobs": [-1.0, None, "x"], "versions": None})
        write_lines(
            root / f"traces/step_{step}/train.jsonl",
            lines,
            torn='{"format": 1, "tok' if hostile and step == steps else "",
        )
    for step in (0, 10, 20, steps):
        good = step > 0
        tasks = [
            trajectory(
                "What is", reward=float(good), tool=good, version=step, rng=random.Random(seed), task_id=f"val-{seed}"
            )
            for seed in range(6)
        ]
        write_lines(root / f"traces/step_{step}/eval.jsonl", tasks)
    (root / "config").mkdir(parents=True, exist_ok=True)
    (root / "config" / "resolved.json").write_text(json.dumps(CONFIG))
    env = {"agentloop-rl": "0.1.0", "python": "3.11.9", "cores": 2, "versions": {"torch": "2.13.0"},
           "argv": ["train", "--config", "recipe.yaml", "rollout.token=hunter2"]}  # fmt: skip
    (root / "env.json").write_text(json.dumps(env))
    return root


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with everything in it."""
    return build_run(tmp_path_factory.mktemp("run") / "quickstart")


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    return build_run


@pytest.fixture(scope="session")
def make_trajectory() -> Callable[..., Line]:
    return trajectory
