"""Seconds of a training step, beside TRL's GRPOTrainer on the same model, rows, lengths and cores in the same run.

    python benchmarks/step.py [--scenario equal longtail tool] [--steps 8] [--record]

Ours is `agentloop train` as users run it: agent loops, HTTP, the rollout server and the FSDP2 worker, each a process.
TRL gets an environment of its own (`.venv-trl`, made here); the fastest of its settings counts. Both have 32 prompts
x 8 samples, one optimizer step a batch, fp32, no reference model.

equal: 64 new tokens in every sample. longtail: lognormal lengths, median 32, at most 512, the same each step. tool: a
model that calls the calculator in (nearly) every episode, made by a short run of the quickstart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parents[1]
QUICKSTART = REPO / "recipes" / "quickstart"
TRL = "trl==1.16.0"
GROUP, BATCH, WARM_UP = 8, 32, 2
TARGETS = {"equal": 0.8, "longtail": 0.5, "tool": 0.5}
REWARD = "def score(task, text, trajectory):\n    return float(hash(tuple(trajectory.token_ids)) % 2)\n"
STAGES = ("rollout/time_s", "train/time_s", "train/wait_s", "rollout/wait_s", "publish/time_s")


def lengths_of(scenario: str) -> list[int]:
    """New tokens of the 256 samples of a step."""
    if scenario == "equal":
        return [64] * (GROUP * BATCH)
    drawn = np.random.default_rng(0).lognormal(np.log(32), 1.0, GROUP * BATCH)
    return [int(n) for n in np.clip(np.round(drawn), 2, 512)]


def questions(count: int) -> list[dict[str, Any]]:
    """Rows of the quickstart."""
    sys.path.insert(0, str(QUICKSTART))
    from data import rows

    return list(rows("train", count))


def run(command: list[str], **options: Any) -> str:
    """Run a command to its end; its output is shown when it fails."""
    result = subprocess.run(command, capture_output=True, text=True, **options)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
    return result.stdout


def caller_model(folder: Path) -> Path:
    """A model that calls the tool: a few steps of the quickstart."""
    out = folder / "caller"
    run(
        agentloop("train", "--config", str(QUICKSTART / "recipe.yaml"), f"run.dir={out}", "run.steps=16",
                  "eval.before_train=false", "eval.every=null")
    )  # fmt: skip
    model = folder / "caller_model"
    shutil.copytree(QUICKSTART / "model", model)
    shutil.copy(out / "weights" / "v_16" / "model.safetensors", model / "model.safetensors")
    return model


def agentloop(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "agentloop.cli", *arguments]


def measure_ours(scenario: str, model: Path, steps: int, folder: Path) -> dict[str, Any]:
    """Median seconds of our step, and of its stages, from the run's own metrics."""
    rows = questions(BATCH * steps)
    lengths = lengths_of(scenario)
    for position, row in enumerate(rows):
        group = position % BATCH
        row["extra_info"]["lengths"] = lengths[group * GROUP : (group + 1) * GROUP]
        row["agent_name"] = "tool_agent" if scenario == "tool" else "forced_length"
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)
    shutil.copy(REPO / "benchmarks" / "bench_agents.py", folder)
    info = folder / "agentloop_bench-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: agentloop-bench\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[agentloop.agents]\nforced_length = bench_agents:ForcedLengthAgent\n")
    run(
        agentloop(
            "train", "--config", str(QUICKSTART / "recipe.yaml"), f"model.path={model}", f"run.dir={folder / 'run'}",
            f"run.steps={steps}", f"data.train={folder / 'rows.jsonl'}", "data.shuffle=false", "data.val=null",
            f"reward={folder / 'reward.py'}:score", "trainer.algorithm.minibatches=1", "checkpoint.every=null",
            "trace.print_every=0", "agents.forced_length.max_response_tokens=512",
        ),
        env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()][WARM_UP:]

    def median(key: str) -> float:
        return statistics.median(row[key] for row in metrics)

    return {
        "step_s": median("step/time_s"),
        "rollout_tokens_per_s": median("rollout/tokens_per_s"),
        "train_tokens_per_s": median("train/tokens_per_s"),
        "sampled_tokens": median("rollout/tokens"),
        "tool_calls": median("episode/tool_calls_mean"),
        "failed": sum(row["episode/failed"] for row in metrics),
        "stages": {key: median(key) for key in STAGES},
    }


def trl_python() -> str:
    """The interpreter of TRL's environment, made when it is not there."""
    python = REPO / ".venv-trl" / "bin" / "python"
    if not python.exists():
        print("making .venv-trl ...", flush=True)
        run([sys.executable, "-m", "venv", str(REPO / ".venv-trl")])
        run([str(python), "-m", "pip", "install", "-q", "-c", str(REPO / "constraints" / "cpu.txt"), "torch", TRL])
    return str(python)


def measure_trl(scenario: str, model: Path, steps: int, folder: Path, threads: int, micro: int) -> dict[str, Any]:
    """Median seconds of TRL's step, generation apart."""
    from agentloop.chat import ChatRenderer, load_tokenizer
    from agentloop.toolset import load_toolset

    renderer = ChatRenderer(load_tokenizer(str(model)))
    schemas = load_toolset(QUICKSTART / "tools.yaml").schemas
    rows = questions(BATCH * steps)
    prompts: list[Any] = [row["prompt"] for row in rows]
    if scenario != "tool":  # the same ids as ours; with tools TRL renders the messages itself
        prompts = [renderer.decode(renderer.start(prompt, schemas)) for prompt in prompts]
    spec = {
        "scenario": scenario, "model": str(model), "prompts": prompts, "group_size": GROUP, "batch_size": BATCH,
        "steps": steps, "lengths": lengths_of(scenario), "end_ids": [renderer.end_of_turn],
        "max_new_tokens": 48 if scenario == "tool" else max(lengths_of(scenario)),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.json").write_text(json.dumps(spec))
    script = str(REPO / "benchmarks" / "peers" / "trl_step.py")
    output = run(
        [trl_python(), script, "--spec", str(folder / "spec.json"), "--micro", str(micro)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
        cwd=folder,
    )
    result = json.loads(output.splitlines()[-1])
    return {
        "step_s": statistics.median(result["steps"][WARM_UP:]),
        "generation_s": statistics.median(result["generation"][WARM_UP:]),
        "tool_calls": statistics.median(result["tool_calls"] or [0]) / (GROUP * BATCH),
        "threads": threads,
        "micro": micro,
    }


def describe(scenario: str, ours: dict[str, Any], trl: list[dict[str, Any]]) -> list[str]:
    """Lines of the table of one scenario."""
    step = ours["step_s"]
    lines = [
        f"### {scenario}",
        "",
        "| | s a step | rollout tokens/s | training tokens/s | |",
        "|---|---|---|---|---|",
        f"| agentloop | {step:.2f} | {ours['rollout_tokens_per_s']:.0f} | {ours['train_tokens_per_s']:.0f} | "
        f"{ours['sampled_tokens']:.0f} sampled tokens, {ours['tool_calls']:.2f} tool calls an episode, "
        f"{ours['failed']} failed |",
    ]
    for peer in trl:
        generation = peer["generation_s"]
        lines.append(
            f"| TRL, {peer['threads']} threads, micro-batch {peer['micro']} | {peer['step_s']:.2f} | "
            f"{ours['sampled_tokens'] / generation:.0f} | | generation {generation:.2f} s, the rest "
            f"{peer['step_s'] - generation:.2f} s, {peer['tool_calls']:.2f} tool calls an episode |"
        )
    shares = ", ".join(f"{key} {value:.2f} s ({value / step:.0%})" for key, value in ours["stages"].items())
    lines += ["", f"Stages of ours (rollout and training overlap): {shares}."]
    if trl:
        best = min(peer["step_s"] for peer in trl)
        met = "met" if step / best <= TARGETS[scenario] else "MISSED"
        lines.append(f"Ratio to the fastest TRL: **{step / best:.2f}** (to reach: {TARGETS[scenario]}, {met}).")
    return [*lines, ""]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--scenario", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    arguments.add_argument("--steps", type=int, default=8, help=f"steps of each run; the first {WARM_UP} do not count")
    arguments.add_argument("--micro", type=int, nargs="+", default=[64, 256], help="micro-batches tried for TRL")
    arguments.add_argument("--threads", type=int, nargs="+", help="threads tried for TRL; default: 1 and all cores")
    arguments.add_argument("--skip-trl", action="store_true")
    arguments.add_argument("--record", action="store_true", help="append the tables to benchmarks/RESULTS.md")
    options = arguments.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cores = len(os.sched_getaffinity(0))
    heading = f"## step.py, {date.today()}, {cores} cores ({platform.processor() or platform.machine()}), CPU, fp32"
    lines = [heading, "", f"`python benchmarks/step.py {' '.join(sys.argv[1:])}`", ""]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        caller = caller_model(folder) if "tool" in options.scenario else None
        for scenario in options.scenario:
            model = caller if scenario == "tool" and caller else QUICKSTART / "model"
            trl = []
            if not options.skip_trl:
                for threads in options.threads or sorted({1, cores}):
                    for micro in options.micro:
                        trl.append(measure_trl(scenario, model, options.steps, folder / "trl", threads, micro))
            ours = measure_ours(scenario, model, options.steps, folder / scenario)
            part = describe(scenario, ours, trl)
            print("\n".join(part), flush=True)
            lines += part
    if options.record:
        results = REPO / "benchmarks" / "RESULTS.md"
        text = results.read_text() if results.exists() else "# Results\n"
        results.write_text(text + "\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
