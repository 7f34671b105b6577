"""What it is worth to sample ahead: step times at `rollout.max_staleness` 0, 1 and 4, and the reward it costs.

    python benchmarks/async.py [--staleness 0 1 4] [--rounds 2] [--curve] [--record | --quick]

`agentloop train` as users run it, with the quickstart's model on two cores. 32 prompts x 8 samples; two turns of
lognormal lengths (median 12, longest 64) and between them a tool that answers after a lognormal time, with 192 tokens
of text. Lengths and times come from a seed and are the same in every step. First the tool's times are scaled until the
rollout of a step costs what its training costs, both measured in a run at staleness 0; then the runs take turns.

ideal: the longer of the two, rollout and training of a step at staleness 0, as if they overlapped wholly.

`--curve`: the quickstart's own recipe at staleness 4 with `correction.decoupled`, to its reward bounds.

Exit code 1: a bound is not met.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ours
from quick import QUICK, add_quick_option, expect, expect_between
from quiet import QUIET_CORES, OtherLoad
from report import hardware, record, table
from step import REPO
from workload import BATCH, GROUP, LEARNING_RATE, QUICKSTART, ROWS

BOUND_FASTER, BOUND_IDEAL = 1.6, 1.1
BOUND_REWARD, BOUND_EVAL = 0.9, 0.95
"""The quickstart's: mean training reward of the last ten steps, greedy evaluation at the end."""

ALIKE = 0.08
"""Rollout and training of a step may differ by so much: then they cost the same."""

TURN_MEDIAN, TURN_LONGEST = 12, 64
WAIT_SPREAD = 0.5
"""Sigma of the lognormal of the tool's times."""

QUICK_BATCH = 4
"""Prompts of a step with `--quick`."""

TOOL_TOKENS = 192
TEMPLATE_TOKENS = 32
"""At most so many tokens are around the tool's text."""


def spread(count: int, median: float, sigma: float, seed: int) -> list[float]:
    """Quantiles of a lognormal, shuffled: median and maximum do not depend on the luck of a seed."""
    normal = statistics.NormalDist()
    drawn = [median * math.exp(sigma * normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    random.Random(seed).shuffle(drawn)
    return drawn


def turn_lengths(samples: int = ROWS) -> list[int]:
    """The new tokens of the turns of a step: two for each of its samples."""
    normal = statistics.NormalDist()
    sigma = math.log(TURN_LONGEST / TURN_MEDIAN) / normal.inv_cdf((2 * samples - 0.5) / (2 * samples))
    return [max(1, round(length)) for length in spread(2 * samples, TURN_MEDIAN, sigma, seed=0)]


def check_work(lines: Sequence[dict[str, Any]], staleness: int, samples: int = ROWS) -> None:
    """Stop when a step is not what this benchmark says: episodes, turns, tokens, staleness."""
    sampled = sum(turn_lengths(samples))
    for line in lines:
        expect("failed or rejected episodes", line["episode/failed"] + line["episode/rejected"], 0)
        expect("episodes of a step", line["episode/count"], samples)
        expect("turns of an episode", line["episode/turns_mean"], 2)
        expect("sampled tokens of a step", line["rollout/tokens"], sampled)
        observed = line["episode/response_tokens_mean"] - sampled / samples
        expect_between("tokens of the tool's text", observed, TOOL_TOKENS, TOOL_TOKENS + TEMPLATE_TOKENS)
    expect("versions that the oldest token was behind", max(line["staleness/max"] for line in lines), staleness)


def write_rows(folder: Path, longest_wait_s: float, steps: int, batch: int) -> None:
    """The rows of a run: questions of the quickstart, for each sample two lengths and a wait."""
    sys.path.insert(0, str(QUICKSTART))
    try:
        from data import rows as questions
    finally:
        sys.path.remove(str(QUICKSTART))
    lengths = turn_lengths(GROUP * batch)
    waits = spread(GROUP * batch, 1.0, WAIT_SPREAD, seed=1)
    waits = [longest_wait_s * wait / max(waits) for wait in waits]
    digits = random.Random(2).choices("0123456789", k=TOOL_TOKENS)
    lines = []
    for position, row in enumerate(questions("train", batch * steps)):
        samples = range(position % batch * GROUP, position % batch * GROUP + GROUP)
        extra = {
            "turns": [lengths[2 * sample : 2 * sample + 2] for sample in samples],
            "waits_s": [waits[sample] for sample in samples],
            "tool_text": "".join(digits),
        }
        row = {**row, "agent_name": ours.TOOL_AGENT, "extra_info": {**row["extra_info"], **extra}}
        lines.append(json.dumps(row) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "reward.py").write_text(ours.REWARD, encoding="utf-8")


def command_of(folder: Path, steps: int, staleness: int, batch: int) -> list[str]:
    overrides = {
        "run.dir": folder / "run",
        "run.steps": steps,
        "data.train": folder / "rows.jsonl",
        "data.val": "null",
        "data.shuffle": "false",
        "data.max_prompt_tokens": 256,
        "reward": f"{folder / 'reward.py'}:score",
        "rollout.max_staleness": staleness,
        "rollout.batch_size": batch,
        "rollout.group_size": GROUP,
        "rollout.max_running": 128,
        "rollout.max_concurrent": 2 * GROUP * batch,
        f"agents.{ours.TOOL_AGENT}.max_assistant_turns": 2,
        f"agents.{ours.TOOL_AGENT}.max_response_tokens": 512,
        "rollout.sampling.max_new_tokens": TURN_LONGEST + 8,
        "trainer.algorithm.minibatches": 1,
        "trainer.optim": f"{{lr: {LEARNING_RATE}, schedule: constant, warmup_steps: 0, grad_clip: 1.0}}",
        "checkpoint.every": "null",
        "trace.print_every": 0,
    }
    return [
        *(sys.executable, "-P", "-m", "agentloop.commands.main", "train", "--config", str(QUICKSTART / "recipe.yaml")),
        *(f"{key}={value}" for key, value in overrides.items()),
    ]


def train(command: list[str], folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run, line by line."""
    path = os.pathsep.join(filter(None, [str(folder / "site"), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    text = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def measure(folder: Path, staleness: int, longest_wait_s: float, options: argparse.Namespace) -> dict[str, Any]:
    """Medians of one run: seconds of a step, of its rollout and of its training."""
    steps, warm_up, batch = options.steps, options.warm_up, options.batch
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_rows(folder, longest_wait_s, steps, batch)
    ours.install_agents(folder / "site")
    with OtherLoad() as others:
        lines = train(command_of(folder, steps, staleness, batch), folder)
    expect("steps of a run", len(lines), steps)
    check_work(lines, staleness, GROUP * batch)
    # The last `staleness` steps have no later rollout beside them.
    counted = lines[warm_up + staleness : len(lines) - staleness]
    keys = {"step_s": "step/time_s", "rollout_s": "rollout/time_s", "train_s": "train/time_s"}
    result: dict[str, Any] = {name: statistics.median(line[key] for line in counted) for name, key in keys.items()}
    result |= {"others_cores": others.cores, "staleness_max": max(line["staleness/max"] for line in lines)}
    print(
        f"  staleness {staleness}: {result['step_s']:.2f} s a step (rollout {result['rollout_s']:.2f}, training "
        f"{result['train_s']:.2f}; others {others.cores or 0:.2f} cores)",
        flush=True,
    )
    return result


def balance(folder: Path, options: argparse.Namespace) -> float:
    """The longest time of the tool with which rollout and training cost the same."""
    wait = 1.0
    for _ in range(6):
        found = measure(folder, 0, wait, options)
        apart = found["train_s"] - found["rollout_s"]
        if abs(apart) <= ALIKE / 2 * found["train_s"]:
            return wait
        wait = max(0.0, wait + apart)
    return wait


def describe(rounds: dict[int, list[dict[str, Any]]]) -> tuple[list[str], bool]:
    median = {
        staleness: {key: statistics.median(one[key] for one in runs) for key in ("step_s", "rollout_s", "train_s")}
        for staleness, runs in rounds.items()
    }
    base = median[0]
    ideal = max(base["rollout_s"], base["train_s"])
    rows = [["max_staleness", "s a step", "rollout", "training", "times as fast as 0", "of the ideal", "oldest token"]]
    for staleness, one in median.items():
        rows.append(
            [
                str(staleness),
                f"{one['step_s']:.2f}",
                f"{one['rollout_s']:.2f}",
                f"{one['train_s']:.2f}",
                f"{base['step_s'] / one['step_s']:.2f}",
                f"{one['step_s'] / ideal:.2f}",
                str(max(run["staleness_max"] for run in rounds[staleness])),
            ]
        )
    lines = [*table(rows), ""]
    met = True
    if 1 in median:
        faster, of_ideal = base["step_s"] / median[1]["step_s"], median[1]["step_s"] / ideal
        met = faster >= BOUND_FASTER and of_ideal <= BOUND_IDEAL
        busy = max(run["others_cores"] or 0.0 for runs in rounds.values() for run in runs)
        lines.append(
            f"**Staleness 1: {faster:.2f} times as fast as 0** (to reach: {BOUND_FASTER}), **{of_ideal:.2f} of the "
            f"ideal overlap** (at most {BOUND_IDEAL}): {'met' if met else 'MISSED'}. Others took up to {busy:.2f} cores"
            f"{'' if busy <= QUIET_CORES else ' (NOT QUIET)'}."
        )
    return [*lines, ""], met


def curve(folder: Path) -> tuple[list[str], bool]:
    """The quickstart at staleness 4."""
    command = [
        *(sys.executable, "-P", "-m", "agentloop.commands.main", "train", "--config", str(QUICKSTART / "recipe.yaml")),
        *(f"run.dir={folder / 'run'}", "rollout.max_staleness=4", "trainer.algorithm.correction.decoupled=true"),
    ]
    lines = train(command, folder)
    evals = [(line["step"], line["eval/reward_mean"]) for line in lines if line.get("eval/reward_mean") is not None]
    oldest = max(line.get("staleness/max", 0) for line in lines)
    last = statistics.fmean([line["reward/mean"] for line in lines if line.get("reward/mean") is not None][-10:])
    met = last >= BOUND_REWARD and evals[-1][1] >= BOUND_EVAL and oldest == 4
    shown = ", ".join(f"{reward:.3f} after {step}" for step, reward in evals)
    text = (
        f"**Quickstart at staleness 4 with `correction.decoupled`: reward {last:.3f} over the last ten steps** (to "
        f"reach: {BOUND_REWARD}), **evaluation {evals[-1][1]:.3f}** (to reach: {BOUND_EVAL}): "
        f"{'met' if met else 'MISSED'}. The oldest token was {oldest} versions behind. Evaluations: {shown}."
    )
    return [text, ""], met


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 4], help="0 is always among them")
    parser.add_argument("--steps", type=int, default=14, help="steps of each run")
    parser.add_argument("--warm-up", type=int, default=2, help="first steps of each run that do not count")
    parser.add_argument("--rounds", type=int, default=2, help="how often the runs take turns")
    parser.add_argument("--wait", type=float, help="the tool's longest time in seconds; default: found by trial")
    parser.add_argument("--curve", action="store_true", help="the reward of the quickstart at staleness 4 as well")
    parser.add_argument("--only-curve", action="store_true", help="and nothing else")
    parser.add_argument("--json", type=Path, help="write all numbers there")
    parser.add_argument("--record", action="store_true", help="write the tables into benchmarks/RESULTS.md")
    add_quick_option(parser)
    options = parser.parse_args()
    options.batch = QUICK_BATCH if options.quick else BATCH
    if options.quick:
        options.staleness, options.steps, options.warm_up = [1], 3, 0
    if options.steps <= options.warm_up + 2 * max(options.staleness):
        parser.error("--steps has to be more than --warm-up and twice the staleness")
    return options


def main() -> None:
    options = _options()
    os.environ["OMP_NUM_THREADS"] = "1"
    command, machine = shlex.join(["python", "benchmarks/async.py", *sys.argv[1:]]), hardware()
    print(f"{command}\n{machine}\n", flush=True)
    lines: list[str] = []
    rounds: dict[int, list[dict[str, Any]]] = {}
    met = True
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        if options.quick:
            measure(folder, 1, 0.05, options)
            print(QUICK)
            return
        if not options.only_curve:
            wait = balance(folder, options) if options.wait is None else options.wait
            rounds = {staleness: [] for staleness in sorted({0, *options.staleness})}
            for _ in range(options.rounds):
                for staleness, runs in rounds.items():
                    runs.append(measure(folder, staleness, wait, options))
            lines, met = describe(rounds)
            lines.insert(0, f"The tool's longest time: {wait:.2f} s.\n")
        if options.curve or options.only_curve:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            found, reached = curve(folder)
            lines, met = lines + found, met and reached
    print("\n" + "\n".join(lines), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"command": command, "hardware": machine, "rounds": rounds}, indent=1))
    if options.record:
        record(REPO / "benchmarks" / "RESULTS.md", command, ["\n".join(lines)], "async.py", machine)
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
