"""Seconds from a command to its first sampled token and its first finished step, and those of `agentloop --help`.

    python benchmarks/startup.py [--beside ROOT] [--rounds 5] [--quick]

`agentloop train` with the quickstart's model of half a million parameters, whose loading and computing take hardly any
time: what remains is starting (imports, checks, template proof, processes, first calls). One step of 4 x 2 episodes of
one token each; the agent notes when the first token is there. Wall clock, and CPU of all processes together.

`--beside ROOT`: another checkout with its own `.venv`, measured in turn on the same cores, for a ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ours
from quick import QUICK, add_quick_option, expect
from quiet import QUIET_CORES, OtherLoad
from report import hardware, table
from step import REPO

BOUND = 0.5
"""To reach, of the seconds that `--beside` takes to its first step."""

BATCH, GROUP = 4, 2
MEASURED = {
    "help_s": "agentloop --help",
    "token_s": "first token",
    "step_s": "first step",
    "end_s": "command",
    "cpu_s": "CPU",
}


def measure(root: Path, folder: Path) -> dict[str, float]:
    """Start `agentloop --help` and a run of one step with the checkout in `root`; return their seconds."""
    python = root / ".venv" / "bin" / "python"
    program = [str(python if python.exists() else sys.executable), "-P", "-m", "agentloop.commands.main"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # as images of containers set it; users' machines do not
    begin = time.perf_counter()
    run([*program, "--help"], environment)
    found = {"help_s": time.perf_counter() - begin}

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_recipe(root, folder)
    metrics, first = folder / "run" / "metrics.jsonl", folder / "first"
    environment |= {"PYTHONPATH": os.pathsep.join([str(root), str(folder / "site")]), "BENCH_FIRST": str(first)}
    command = [*program, "train", "--config", str(folder / "recipe.yaml")]
    cpu, clock, begin = cpu_s(), time.time(), time.perf_counter()
    with ours.Arrivals(metrics) as arrivals:
        run(command, environment)
    end = time.perf_counter()

    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    expect("steps of the run", len(lines), 1)
    expect("episodes of the step", lines[0]["episode/count"], BATCH * GROUP)
    expect("sampled tokens of the step", lines[0]["rollout/tokens"], BATCH * GROUP)
    expect("failed or rejected episodes", lines[0]["episode/failed"] + lines[0]["episode/rejected"], 0)
    return found | {
        "token_s": float(first.read_text()) - clock,
        "step_s": arrivals.times[0] - begin,
        "end_s": end - begin,
        "cpu_s": cpu_s() - cpu,
    }


def write_recipe(root: Path, folder: Path) -> None:
    """The quickstart's recipe with its tools, for one step of one token an episode."""
    quickstart = root / "recipes" / "quickstart"
    sys.path.insert(0, str(quickstart))
    try:
        from data import rows
    finally:
        sys.path.remove(str(quickstart))
    text = "".join(json.dumps({**row, "agent_name": ours.FIRST_AGENT}) + "\n" for row in rows("train", BATCH))
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    (folder / "reward.py").write_text(ours.REWARD, encoding="utf-8")
    ours.install_agents(folder / "site")
    recipe = {
        "run": {"dir": str(folder / "run"), "steps": 1},
        "model": {"path": str(quickstart / "model")},
        "data": {"train": str(folder / "rows.jsonl")},
        "tools": str(quickstart / "tools.yaml"),
        "reward": f"{folder / 'reward.py'}:score",
        "rollout": {"batch_size": BATCH, "group_size": GROUP},
        "checkpoint": {"every": None},
        "trace": {"print_every": 0},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML


def run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, help="root of another checkout, with its .venv, for a ratio")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each, in turn; medians are shown")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    add_quick_option(parser)
    options = parser.parse_args()
    roots = {"agentloop": REPO} | ({str(options.beside.name): options.beside.resolve()} if options.beside else {})
    print(f"{shlex.join(['python', 'benchmarks/startup.py', *sys.argv[1:]])}\n{hardware()}\n", flush=True)

    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in roots}
    with tempfile.TemporaryDirectory() as scratch, OtherLoad() as others:
        for number in range(1 if options.quick else options.rounds + 1):
            for name, root in roots.items():
                one = measure(root, Path(scratch) / name)
                if number or options.quick:  # the first fills the caches of files and of compiled modules
                    rounds[name].append(one)

    median = {
        name: {key: statistics.median(one[key] for one in runs) for key in MEASURED} for name, runs in rounds.items()
    }
    print("\n".join(describe(median)), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"rounds": rounds, "others_cores": others.cores}, indent=1))
    if options.quick:
        print(QUICK)
        return
    busy = others.cores is not None and others.cores > QUIET_CORES
    print(f"Others took {others.cores or 0:.2f} cores{': too much for a verdict' if busy else ''}.")
    if len(median) == 2:
        own, other = (one["step_s"] for one in median.values())
        print(f"To the first step: {own / other:.2f} of {options.beside.name} (to reach: {BOUND})")
        sys.exit(0 if own / other <= BOUND else 1)


def describe(median: dict[str, dict[str, float]]) -> list[str]:
    rows: list[list[Any]] = [["seconds", *MEASURED.values()]]
    rows += [[name, *(f"{one[key]:.2f}" for key in MEASURED)] for name, one in median.items()]
    return [*table(rows), ""]


if __name__ == "__main__":
    main()
