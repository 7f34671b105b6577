"""Training alone, beside TRL's GRPOTrainer: same model, trajectories and core, in turn; tokens a second and memory.

    python benchmarks/train.py [--model quickstart 30m] [--scenario equal longtail] [--core 0] [--record | --quick]

Ours is a rank of the trainer as `agentloop train` starts it, driven through `WorkerGroup`. TRL has an
environment of its own (`.venv-trl`, made here); its `rollout_func` hands it the same trajectories, and what it spends
on getting them is taken off. Its micro-batches are tried first (`--micro`), in turn: the fastest is measured, and what
the others took is told beside it. The largest by default is the whole batch at once, on the long tail too.

GRPO, one optimizer step a batch, token mean, AdamW, fp32, one thread on one core; TRL without gradient checkpointing,
which makes it faster, ours with it at 31 M. Both take the gradient norm of the same batch: they have to agree, or
nothing is compared.

quickstart  32 prompts x 8 samples, 0.5 M parameters, 384 ids
30m          4 prompts x 8 samples, 31 M parameters (Qwen2, 512 wide, 8 layers, 8,192 ids), random weights

equal       36 + 64 tokens        longtail  36 + lognormal lengths: median 32, longest 512

Tokens: prompt and completion of every sample, whatever a trainer computes for them. Memory: the peak of the whole
process, and what training takes beyond the loaded model. Bounds: half of the latter beside TRL's fastest micro-batch,
half of the former beside the largest that was tried.

`--device cuda` measures something else, on a card and without TRL: see `train_card.py`.

Exit code 1: a bound is not met.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import train_card
from quick import QUICK, add_quick_option, expect
from quiet import QUIET_CORES, OtherLoad
from report import hardware, record, table
from step import REPO, run, trl_python
from trajectories import trajectories
from workload import GROUP, LEARNING_RATE, QUICKSTART

RESULTS = REPO / "benchmarks" / "RESULTS.md"
PROMPTS = {"quickstart": 32, "30m": 4}
MICRO = {"quickstart": (256, 128, 64, 32), "30m": (32, 16, 8)}
OURS: dict[str, dict[str, Any]] = {
    "quickstart": {"tokens_per_micro_batch": 1100},
    "30m": {"tokens_per_micro_batch": 1024, "logprob_chunk": 256, "fsdp": {"activation_checkpointing": True}},
}
"""Settings of our trainer, as TRL's micro-batch is one of its: small micro-batches are as fast on a CPU.

`equal`: a group, its prompt once, is 548 tokens; so two of them, or one.
"""

SMALL_HEAP = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=2097152:glibc.malloc.trim_threshold=1073741824"
"""For `30m`: what is larger than a huge page is given back when it is freed (docs/performance.md)."""

BOUND_SPEED = {"equal": 1.2, "longtail": 4.0}
BOUND_MEMORY = 0.5
NORMS_APART = 1e-3
MODEL_30M = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 8, "vocab_size": 8192, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip


def model_folder(name: str, scratch: Path) -> Path:
    """The quickstart's model, or a larger one with random weights and the quickstart's tokenizer, which nobody uses."""
    if name == "quickstart":
        return QUICKSTART / "model"
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    folder = scratch / name
    Qwen2ForCausalLM(Qwen2Config(**MODEL_30M)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(QUICKSTART / "model").save_pretrained(folder)
    return folder


def samples_of(scenario: str, prompts: int, step: int) -> list[Any]:
    """The rows of a step as our trainer takes them, with GRPO's advantages."""
    from trainer.algorithms.advantage import grpo
    from trainer.types import TrainSample

    rows = trajectories(scenario, prompts, step)
    samples = []
    for index, row in enumerate(rows):
        group = index // GROUP
        rewards = np.array([other.reward for other in rows[group * GROUP : (group + 1) * GROUP]])
        mask = np.array([False] * len(row.prompt) + [True] * len(row.completion))
        samples.append(
            TrainSample(
                token_ids=np.array(row.prompt + row.completion, dtype=np.int64),
                loss_mask=mask,
                old_logprobs=np.zeros(len(mask), dtype=np.float32),
                advantages=np.where(mask, grpo(rewards)[index % GROUP], 0.0).astype(np.float32),
                prompt_length=len(row.prompt),
                group_key=group,
            )
        )
    return samples


def resident_bytes(process: psutil.Process) -> tuple[int, int]:
    """Resident memory of a process now, and at its peak."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


async def ours(
    model: Path, settings: dict[str, Any], scenarios: Sequence[str], prompts: int, steps: int, scratch: Path
) -> dict[str, Any]:
    """Our trainer's steps, in the form of the peer's answer: `steps` of each scenario, one after the other."""
    from agentloop.config import TrainerConfig
    from trainer.workers.group import WorkerGroup

    if settings is OURS["30m"]:
        os.environ["GLIBC_TUNABLES"] = SMALL_HEAP  # read by the rank; TRL runs without
    config = TrainerConfig.model_validate({"optim": {"lr": LEARNING_RATE}, **settings})
    group = await WorkerGroup.start(
        model_path=str(model),
        config=config,
        dtype="float32",
        total_steps=len(scenarios) * steps,
        seed=0,
        log_dir=scratch / "logs",
    )
    try:
        rank = next(child for child in psutil.Process().children() if "trainer.learner.process" in child.cmdline())
        before, _ = resident_bytes(rank)
        found = []
        for scenario, step in itertools.product(scenarios, range(steps)):
            samples = samples_of(scenario, prompts, step)
            # The ratio is 1, as it is for TRL.
            for sample, own in zip(samples, await group.logprobs(samples, temperature=1.0), strict=True):
                sample.old_logprobs = own
            begin = time.perf_counter()
            sums = await group.accumulate(samples, temperature=1.0)
            taken = await group.step(sums["normalizer"])
            completions = sum(len(row.completion) for row in trajectories(scenario, prompts, step))
            expect("rows of a step", len(samples), prompts * GROUP)
            expect("trained tokens of a step", int(sums["tokens"]), completions)
            expect("a step has a gradient", taken["grad_norm"] > 0, True)
            found.append({"train_s": time.perf_counter() - begin, "grad_norm": taken["grad_norm"]})
        _, peak = resident_bytes(rank)
    finally:
        await group.close()
    return {"steps": found, "before_bytes": before, "peak_bytes": peak}


def theirs(python: Path, model: Path, scenario: str, prompts: int, micro: int, steps: int) -> dict[str, Any]:
    command = [
        *(str(python), str(REPO / "benchmarks" / "peers" / "trl_train.py"), "--model", str(model)),
        *("--scenario", scenario, "--prompts", str(prompts), "--micro", str(micro), "--steps", str(steps)),
    ]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "GLIBC_TUNABLES")}
    answer: dict[str, Any] = json.loads(run(command, env=environment).splitlines()[-1])
    return answer


def median_s(rounds: list[dict[str, Any]], warm_up: int) -> float:
    return statistics.median(step["train_s"] for one in rounds for step in one["steps"][warm_up:])


def measure(name: str, scenario: str, python: Path, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Both sides in turn."""
    model, prompts = model_folder(name, scratch), PROMPTS[name]
    tokens = statistics.mean(
        sum(len(row.prompt) + len(row.completion) for row in trajectories(scenario, prompts, step))
        for step in range(options.steps)
    )
    tried: dict[int, dict[str, float]] = {}
    for _ in range(options.tries):  # in turn, so that a busy minute does not fall on one of them
        for micro in options.micro or MICRO[name]:
            one = theirs(python, model, scenario, prompts, micro, 2)
            before = tried.get(micro, {"train_s": float("inf"), "peak_bytes": 0})
            tried[micro] = {
                "train_s": min(before["train_s"], *(step["train_s"] for step in one["steps"])),
                "peak_bytes": max(before["peak_bytes"], one["peak_bytes"]),
            }
            print(f"  TRL tried: micro-batch {micro}: {tried[micro]['train_s']:.2f} s", flush=True)
    micro = min(tried, key=lambda size: tried[size]["train_s"])
    rounds: dict[str, list[dict[str, Any]]] = {"trl": [], "agentloop": []}
    for _ in range(options.rounds):
        for side in rounds:
            with OtherLoad() as others:
                if side == "trl":
                    one = theirs(python, model, scenario, prompts, micro, options.steps)
                else:
                    one = asyncio.run(ours(model, OURS[name], [scenario], prompts, options.steps, scratch))
            one["others_cores"] = others.cores
            rounds[side].append(one)
            print(f"  {side}: {median_s([one], options.warm_up):.2f} s, others {others.cores:.2f} cores", flush=True)
    return {"model": name, "scenario": scenario, "tokens": tokens, "micro": micro, "tried": tried, "rounds": rounds}


def describe(result: dict[str, Any], warm_up: int) -> tuple[list[str], bool]:
    """The table of one comparison, and whether its bounds are met."""
    rounds, tokens = result["rounds"], result["tokens"]
    speed = {side: tokens / median_s(rounds[side], warm_up) for side in rounds}
    peak = {side: max(one["peak_bytes"] for one in rounds[side]) for side in rounds}
    grown = {side: max(one["peak_bytes"] - one["before_bytes"] for one in rounds[side]) for side in rounds}
    norms = {side: [step["grad_norm"] for step in rounds[side][0]["steps"]] for side in rounds}
    apart = max(abs(a / b - 1) for a, b in zip(norms["agentloop"], norms["trl"], strict=True))
    busy = max((one["others_cores"] or 0.0) for side in rounds.values() for one in side)
    bound = BOUND_SPEED[result["scenario"]]
    ratio, memory = speed["agentloop"] / speed["trl"], grown["agentloop"] / grown["trl"]
    largest, at_once = max(result["tried"]), PROMPTS[result["model"]] * GROUP
    whole = peak["agentloop"] / result["tried"][largest]["peak_bytes"]
    met = ratio >= bound and memory <= BOUND_MEMORY and whole <= BOUND_MEMORY
    names = {"agentloop": "agentloop", "trl": f"TRL, micro-batch {result['micro']}"}
    rows = [
        [
            names[side],
            f"{speed[side]:,.0f}",
            f"{peak[side] / 2**20:,.0f}",
            f"{grown[side] / 2**20:,.0f}",
            "" if side == "agentloop" else f"{peak['agentloop'] / peak['trl']:.2f}",
        ]
        for side in ("agentloop", "trl")
    ]
    rows += [
        [
            f"tried: micro-batch {size}" + (", all at once" if size == at_once else ""),
            f"{tokens / one['train_s']:,.0f}",
            f"{one['peak_bytes'] / 2**20:,.0f}",
            "",
            f"{peak['agentloop'] / one['peak_bytes']:.2f}",
        ]
        for size, one in sorted(result["tried"].items())
    ]
    lines = [f"### {result['model']}, {result['scenario']}: {tokens:,.0f} tokens a step", ""]
    lines += table([["", "tokens/s", "peak MiB", "grown MiB", "our share of the peak"], *rows])
    verdict = "met" if met else "MISSED"
    if apart > NORMS_APART:
        verdict, met = "NOT COMPARABLE", False
    lines += [
        "",
        f"**{ratio:.2f} times TRL's tokens/s** (to reach: {bound}), **{memory:.2f} of the memory that its training "
        f"takes** and **{whole:.2f} of its whole process with micro-batches of {largest}** (both at "
        f"most {BOUND_MEMORY}): {verdict}. Of TRL's whole process at its fastest: "
        f"{peak['agentloop'] / peak['trl']:.2f}. "
        f"Gradient norms apart by "
        f"{apart:.0e}; others took up to {busy:.2f} cores{'' if busy <= QUIET_CORES else ' (NOT QUIET)'}.",
        "",
    ]
    return lines, met


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=tuple(PROMPTS), default=list(PROMPTS))
    parser.add_argument("--scenario", nargs="+", choices=tuple(BOUND_SPEED), default=list(BOUND_SPEED))
    parser.add_argument("--steps", type=int, default=4, help="steps of each run, the warm-up counted")
    parser.add_argument("--warm-up", type=int, default=1, help="first steps of each run that do not count")
    parser.add_argument("--rounds", type=int, default=2, help="how often TRL and ours run in turn")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: share of a card's peak")
    parser.add_argument("--dry-run", action="store_true", help="--device cuda: try the code on the CPU")
    parser.add_argument("--core", type=int, help="run on this core; default: the last of those this process may use")
    parser.add_argument("--python", type=Path, help="interpreter of TRL's environment; default: .venv-trl's")
    parser.add_argument("--micro", type=int, nargs="+", help="TRL's micro-batches to try; default: by model")
    parser.add_argument("--tries", type=int, default=2, help="how often each micro-batch is tried, in turn")
    parser.add_argument("--json", type=Path, help="write every step of every run there")
    parser.add_argument("--record", action="store_true", help="write the tables into benchmarks/RESULTS.md")
    add_quick_option(parser)
    return parser.parse_args()


def on_card(options: argparse.Namespace, command: str) -> bool:
    """Measure, print and record the card; whether its bound is met."""
    rows = train_card.measure(train_card.DRY if options.dry_run else train_card.CARD)
    lines, met = train_card.describe(rows, dry=options.dry_run)
    print("\n" + "\n".join(lines), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"command": command, "rows": rows}, indent=1))
    if options.record and not options.dry_run:
        import torch

        record(RESULTS, command, ["\n".join(lines)], "train.py, on a card", torch.cuda.get_device_name())
    return met


def quick() -> None:
    """Ours alone, a step of two groups of each scenario: rows, tokens and a gradient are as they should be."""
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(ours(QUICKSTART / "model", OURS["quickstart"], list(BOUND_SPEED), 2, 1, Path(folder)))
    print(QUICK)


def main() -> None:
    options = _options()
    if options.quick:
        quick()
        return
    if options.device == "cuda":
        sys.exit(0 if on_card(options, shlex.join(["python", "benchmarks/train.py", *sys.argv[1:]])) else 1)
    python = trl_python(options.python)
    machine = hardware()
    core = options.core if options.core is not None else max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})  # children inherit it
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    command = shlex.join(["python", "benchmarks/train.py", *sys.argv[1:]])
    print(f"{command}\n{machine}\n", flush=True)
    results, tables, met = [], [], True
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in options.model:
            for scenario in options.scenario:
                print(f"{name}, {scenario}", flush=True)
                results.append(measure(name, scenario, python, options, scratch))
                lines, fine = describe(results[-1], options.warm_up)
                met &= fine
                tables.append("\n".join(lines))
                print("\n" + tables[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps({"command": command, "hardware": machine, "results": results}, indent=1))
    if options.record:
        record(RESULTS, command, tables, "train.py", machine)
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
