"""`train.py --device cuda`: the share of a card's peak that the trainer reaches, and its memory.

A rank as `agentloop train` starts it, bf16 compute with fp32 master weights, activation
checkpointing; Qwen2 of half a billion and of one and a half billion parameters with random weights;
one packed row of 8k and of 16k tokens a step, in samples of 2,048 tokens, four to a prompt. The
peak is that of a bf16 matmul, measured in the same run.

Share of the peak: the model's own operations (`flops.py`) divided by seconds and peak;
recomputation by checkpointing is not counted. With `--dry-run` the same code runs a tiny model on
the CPU: its numbers mean nothing.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from report import table

BOUND_SHARE = 0.45
SAMPLE_TOKENS, PROMPT_TOKENS, GROUP = 2048, 256, 4
WARM_UP, STEPS = 2, 5

QWEN2 = {
    "0.5b": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True,
    },
    "1.5b": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True,
    },
}  # fmt: skip
TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 256, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A measurement: models by name, tokens of a step, length of a sample, device and dtype."""

    models: dict[str, dict[str, Any]]
    tokens: tuple[int, ...]
    sample_tokens: int
    prompt_tokens: int
    device: str
    dtype: str


CARD = Plan(QWEN2, (8192, 16_384), SAMPLE_TOKENS, PROMPT_TOKENS, "cuda", "bfloat16")
DRY = Plan({"tiny": TINY}, (512,), 64, 8, "cpu", "float32")


def measure(plan: Plan) -> list[dict[str, Any]]:
    """Measure each model with each number of tokens; one row for each.

    Raises:
        SystemExit: the device is missing.
    """
    import torch

    if plan.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: run this on a machine with one, or try the code with --dry-run")
    peak = peak_flops(plan)
    print(f"peak of a {plan.dtype} matmul: {peak / 1e12:,.1f} TFLOP/s", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in plan.models.items():
            model = Path(folder) / name
            write_config(model, shape)
            for tokens in plan.tokens:
                found = asyncio.run(run(plan, model, tokens, Path(folder) / "logs"))
                rows.append(
                    {"model": name, "tokens": tokens, "share": found["flops"] / found["step_s"] / peak, **found}
                )
                print(f"  {name}, {tokens:,} tokens: {found['step_s']:.3f} s a step", flush=True)
    return rows


def peak_flops(plan: Plan) -> float:
    """Return operations a second of a large square matmul: the best of several."""
    import torch

    size = 8192 if plan.device == "cuda" else 256
    a = torch.randn(size, size, device=plan.device, dtype=getattr(torch, plan.dtype))
    best = float("inf")
    for _ in range(10):
        if plan.device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        a @ a
        if plan.device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return float(2 * size**3 / best)


def write_config(folder: Path, shape: dict[str, Any]) -> None:
    from transformers import Qwen2Config

    Qwen2Config(**shape, max_position_embeddings=32_768, architectures=["Qwen2ForCausalLM"]).save_pretrained(folder)


def samples_of(plan: Plan, tokens: int, vocab: int) -> list[Any]:
    """Make groups of four samples on one prompt, `tokens` packed tokens in all, or just below."""
    from trainer.types import TrainSample

    rng = np.random.default_rng(0)
    own = plan.sample_tokens - plan.prompt_tokens
    packed_group = plan.prompt_tokens + GROUP * own
    samples = []
    for group in range(max(1, tokens // packed_group)):
        prompt = rng.integers(0, vocab, plan.prompt_tokens)
        # The last group fills the rest of the row.
        length = own if tokens >= packed_group else (tokens - plan.prompt_tokens) // GROUP
        for number in range(GROUP):
            ids = np.concatenate([prompt, rng.integers(0, vocab, length)])
            mask = np.arange(len(ids)) >= plan.prompt_tokens
            samples.append(
                TrainSample(
                    token_ids=ids,
                    loss_mask=mask,
                    old_logprobs=np.zeros(len(ids), dtype=np.float32),
                    advantages=np.where(mask, 1.0 if number % 2 else -1.0, 0.0).astype(np.float32),
                    prompt_length=plan.prompt_tokens,
                    group_key=group,
                )
            )
    return samples


async def run(plan: Plan, model: Path, tokens: int, logs: Path) -> dict[str, Any]:
    """Return seconds of a step, operations of its micro-batch, and the device memory in use at the end."""
    import torch
    from flops import ModelShape, packed_flops

    from agentloop.config import TrainerConfig
    from trainer.packing.layout import pack
    from trainer.packing.units import plan_units
    from trainer.types import LossSpec
    from trainer.workers.group import WorkerGroup

    shape = ModelShape.of(model)
    samples = samples_of(plan, tokens, shape.vocab)
    batch = pack(samples, plan_units(samples, tokens), "token_mean")
    config = TrainerConfig.model_validate(
        {"device": plan.device, "tokens_per_micro_batch": tokens, "fsdp": {"activation_checkpointing": True}}
    )
    group = await WorkerGroup.start(
        model_path=str(model), config=config, dtype=plan.dtype, total_steps=100, seed=0, log_dir=logs, init="random"
    )
    try:
        seconds = []
        for _ in range(WARM_UP + STEPS):
            begin = time.perf_counter()
            sums = await group.accumulate(samples, temperature=1.0, loss=LossSpec(kind="pg"))
            await group.step(sums["normalizer"])
            seconds.append(time.perf_counter() - begin)
        used = 0
        if plan.device == "cuda":
            free, whole = torch.cuda.mem_get_info()
            used = whole - free
    finally:
        await group.close()
    return {
        "step_s": statistics.median(seconds[WARM_UP:]),
        "packed": len(batch.tokens),
        "flops": packed_flops(shape, batch),
        "used_bytes": used,
    }


def describe(rows: list[dict[str, Any]], *, dry: bool) -> tuple[list[str], bool]:
    cells = [["model", "packed tokens", "s a step", "tokens/s", "of the peak", "GiB in use"]]
    for row in rows:
        cells.append(
            [
                row["model"],
                f"{row['packed']:,}",
                f"{row['step_s']:.3f}",
                f"{row['packed'] / row['step_s']:,.0f}",
                f"{row['share']:.1%}",
                f"{row['used_bytes'] / 2**30:.1f}",
            ]
        )
    least = min(row["share"] for row in rows)
    met = least >= BOUND_SHARE
    verdict = "dry run: no verdict" if dry else f"to reach: {BOUND_SHARE:.0%}; {'met' if met else 'MISSED'}"
    return [*table(cells), "", f"**At least {least:.1%} of the peak** ({verdict}).", ""], met or dry
