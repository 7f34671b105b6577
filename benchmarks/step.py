"""Seconds of a training step beside TRL's GRPOTrainer: same model, rows, batch, lengths and cores, in the same run.

    python benchmarks/step.py [--scenario equal longtail tool tool-short] [--cores 0,1] [--record | --quick]

Ours is `agentloop train` as users run it, with the quickstart's settings: agent loops, HTTP, the rollout server and
the FSDP2 worker in processes of their own. TRL has an environment of its own (`.venv-trl`, made here) and its fastest
settings: one thread and one a core, then micro-batches of 32 to 256 rows are tried. Then both run in turn, `--rounds`
times. When other processes take more than a tenth of a core meanwhile, no verdict is given: a ratio would mean nothing.

Both: 32 prompts x 8 samples, one optimizer step a batch, AdamW, fp32, no reference model, temperature 1.

equal       prompts of 36 tokens, 64 new tokens in every sample
longtail    prompts of 36 tokens, lognormal lengths: median 32, longest 512; the same 256 lengths in every step
tool        prompts of 199 tokens (the tool's JSON schema is in them), a calculator call in every episode
tool-short  the same with the quickstart's own prompts of 36 tokens
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ours
from caller import make_caller
from quick import QUICK, add_quick_option, expect, expect_between
from quiet import OtherLoad
from report import NOT_COMPARABLE, all_steps, describe, hardware, record
from workload import BATCH, QUICKSTART, SCENARIOS, Workload, uses_tool, workload

REPO = Path(__file__).resolve().parents[1]
TRL = "trl==1.16.0"
MICRO = (64, 32, 128, 256)
"""per_device_train_batch_size values that are tried; with the first the number of threads is chosen."""

CLOSE = 1.15
"""Another number of threads that is at most so much slower when settings are tried runs in the measured rounds too."""

CALLS = (0.9, 1.2)
"""Calls of an episode in the tool scenarios: the model was tuned to call in each."""

QUICK_BATCH, QUICK_CALLS = 4, (0.01, 1.2)
"""Prompts of a step with `--quick`, and calls of an episode: the model was hardly tuned."""

TOKENS_APART = 0.02
"""The model ends its turns in the tool scenarios: so far the sampled tokens of a step may differ between the two."""


def run(command: list[str], **options: Any) -> str:
    """Run a command to its end; its output is shown when it fails."""
    result = subprocess.run(command, capture_output=True, text=True, **options)
    if result.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
    return result.stdout


def trl_python(given: Path | None) -> Path:
    """The interpreter of TRL's environment, which is made when it is not there."""
    python = given or REPO / ".venv-trl" / "bin" / "python"
    if given is None and not python.exists():
        print("making .venv-trl ...", flush=True)
        run([sys.executable, "-m", "venv", str(REPO / ".venv-trl")])
        constraint = str(REPO / "constraints" / "cpu.txt")
        run([str(python), "-m", "pip", "install", "--quiet", "--constraint", constraint, "torch", TRL])
    version = run([str(python), "-c", "import importlib.metadata as m; print(m.version('trl'))"]).strip()
    if f"trl=={version}" != TRL:
        print(f"note: {python} has TRL {version}, not {TRL}", flush=True)
    return python


class Peer:
    """TRL on one scenario."""

    def __init__(self, python: Path, scenario: str, model: Path) -> None:
        self._python, self._scenario, self._model = python, scenario, model

    def measure(self, threads: int, micro: int, steps: int, warm_up: int) -> list[dict[str, float]]:
        """A run of TRL; returns its steps after the warm-up."""
        command = [
            *(str(self._python), str(REPO / "benchmarks" / "peers" / "trl_step.py"), "--model", str(self._model)),
            *("--scenario", self._scenario, "--threads", str(threads), "--micro", str(micro)),
            *("--steps", str(steps)),
        ]
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "GLIBC_TUNABLES")}
        return json.loads(run(command, env=environment).splitlines()[-1])["steps"][warm_up:]

    def tune(self, threads_tried: Sequence[int], micro: Sequence[int]) -> list[dict[str, Any]]:
        """Try the settings; returns {threads, micro, step_s} of each, the fastest first.

        The threads are chosen with the first micro-batch, then the micro-batch with those threads.
        """
        tried = [self._try(threads, micro[0]) for threads in threads_tried]
        threads = _fastest(tried)[0]["threads"]
        tried += [self._try(threads, size) for size in micro[1:]]
        return _fastest(tried)

    def _try(self, threads: int, micro: int) -> dict[str, Any]:
        steps = self.measure(threads, micro, steps=3, warm_up=1)
        found = {"threads": threads, "micro": micro, "step_s": min(step["step_s"] for step in steps)}
        print(f"  TRL tried: {threads} threads, micro-batch {micro}: {found['step_s']:.2f} s a step", flush=True)
        return found


def _fastest(tried: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(tried, key=lambda one: one["step_s"])


def measured_settings(tried: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """(threads, micro-batch) of TRL in the measured rounds: the fastest, and the best of other threads when close."""
    chosen = [tried[0]]
    others = [one for one in tried if one["threads"] != tried[0]["threads"]]
    chosen += [one for one in others[:1] if one["step_s"] <= CLOSE * tried[0]["step_s"]]
    return [(one["threads"], one["micro"]) for one in chosen]


def check_our_work(work: Workload, steps: Sequence[dict[str, Any]], calls: tuple[float, float] = CALLS) -> None:
    """Stop when a step of ours is not what its scenario says: episodes, tokens, calls of an episode."""
    for step in steps:
        expect(f"{work.scenario}: episodes of a step", step["episode/count"], work.samples)
        expect(f"{work.scenario}: failed or rejected episodes", step["episode/failed"] + step["episode/rejected"], 0)
        if work.lengths:
            expect(f"{work.scenario}: sampled tokens of a step", step["rollout/tokens"], sum(work.lengths))
            expect(f"{work.scenario}: longest answer", step["episode/response_tokens_max"], max(work.lengths))
        else:
            expect_between(f"{work.scenario}: calls an episode", step["episode/tool_calls_mean"], *calls)


def check_same_work(work: Workload, our_steps: list[dict[str, Any]], trl_steps: list[dict[str, float]]) -> list[str]:
    """Stop when lengths that are given were not kept or a step had no gradient; note what else is not the same."""
    notes = []
    our_tokens = statistics.median(step["rollout/tokens"] for step in our_steps)
    sides = [("agentloop", our_tokens)]
    if trl_steps:
        sides.append(("TRL", statistics.median(step["sampled_tokens"] for step in trl_steps)))
    norms = [("agentloop", step["train/grad_norm"]) for step in our_steps]
    norms += [("TRL", step["grad_norm"]) for step in trl_steps]
    idle = sorted({name for name, norm in norms if not norm})
    if idle:
        raise SystemExit(f"{work.scenario}: no gradient in a step of {', '.join(idle)}: nothing was trained there")
    for name, tokens in sides:
        if work.lengths and tokens != sum(work.lengths):
            raise SystemExit(f"{work.scenario}: {name} sampled {tokens:.0f} tokens a step, not {sum(work.lengths)}")
    if trl_steps and abs(sides[0][1] / sides[1][1] - 1) > TOKENS_APART:
        notes.append(f"{NOT_COMPARABLE} {our_tokens:.0f} sampled tokens a step, TRL {sides[1][1]:.0f}.")
    lost = sum(step["episode/failed"] + step["episode/rejected"] for step in our_steps)
    if lost:
        notes.append(f"{NOT_COMPARABLE} {lost} of our episodes failed or were rejected.")
    return notes


def measure(scenario: str, options: argparse.Namespace, python: Path | None, scratch: Path) -> dict[str, Any]:
    """All runs of one scenario, in turn."""
    model = QUICKSTART / "model"
    if uses_tool(scenario):
        model = make_caller(scratch / f"model-{scenario}", schema=scenario == "tool", quick=options.quick)
    work = workload(scenario, model, options.steps, options.batch)
    print(f"{scenario}: {len(work.rows)} rows, {sum(work.lengths) or 'model-ended'} new tokens a step", flush=True)
    trl: list[dict[str, Any]] = []
    tried: list[dict[str, Any]] = []
    if python:
        peer = Peer(python, scenario, model)
        settings = [tuple(map(int, one.split("x"))) for one in options.trl_setting]
        if not settings:
            tried = peer.tune(options.threads or sorted({1, len(os.sched_getaffinity(0))}), options.micro)
            settings = measured_settings(tried)
        trl = [{"threads": threads, "micro": micro, "rounds": []} for threads, micro in settings]
    rounds: list[dict[str, Any]] = []
    folder = scratch / f"ours-{scenario}"
    for _ in range(options.rounds):
        for one in trl:
            name = f"TRL, threads {one['threads']}, micro-batch {one['micro']}"
            run_trl = partial(peer.measure, one["threads"], one["micro"], options.steps, options.warm_up)
            one["rounds"].append(_watched(name, "step_s", run_trl))
        run_ours = partial(ours.measure, work, model, options.steps, options.warm_up, folder, options.override)
        rounds.append(_watched("agentloop", "wall_s", run_ours))
    expect(f"{scenario}: rows", len(work.rows), work.batch * options.steps)
    check_our_work(work, all_steps(rounds), QUICK_CALLS if options.quick else CALLS)
    trl.sort(key=lambda one: statistics.median(step["step_s"] for step in all_steps(one["rounds"])))
    command = ours.train_command(model, options.steps, folder, options.override, work.batch)
    return {
        "scenario": scenario,
        "command": shlex.join(["agentloop", *command[4:]]).replace(str(scratch), "SCRATCH").replace(f"{REPO}/", ""),
        "tried": tried,
        "ours": rounds,
        "trl": trl,
        "notes": check_same_work(work, all_steps(rounds), all_steps(trl[0]["rounds"]) if trl else []),
    }


def _watched(name: str, key: str, measured: Callable[[], list[dict[str, Any]]]) -> dict[str, Any]:
    """The steps of a run, and what other processes took of the cores meanwhile."""
    with OtherLoad() as others:
        steps = measured()
    seconds = statistics.median(step[key] for step in steps)
    taken = "" if others.cores is None else f"  (other processes took {others.cores:.2f} cores)"
    print(f"  {name}: {seconds:.2f} s a step{taken}", flush=True)
    return {"steps": steps, "other_cores": others.cores}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--steps", type=int, default=6, help="steps of each run, the warm-up counted")
    parser.add_argument("--warm-up", type=int, default=2, help="first steps of each run that do not count")
    parser.add_argument("--rounds", type=int, default=2, help="how often TRL and ours run in turn")
    parser.add_argument("--cores", help="for instance 0,1: run on these only; default: all that this process may use")
    parser.add_argument("--python", type=Path, help="interpreter of TRL's environment; default: .venv-trl's")
    parser.add_argument("--threads", type=int, nargs="+", help="tried for TRL; default: 1 and all cores")
    parser.add_argument("--micro", type=int, nargs="+", default=MICRO, help="micro-batches that are tried for TRL")
    parser.add_argument(
        "--trl-setting", nargs="+", default=[], metavar="THREADSxMICRO", help="for instance 1x64: try no others"
    )
    parser.add_argument("--skip-trl", action="store_true", help="ours alone")
    parser.add_argument("--override", nargs="+", default=[], metavar="KEY=VALUE", help="of our recipe; last one wins")
    parser.add_argument("--scratch", type=Path, help="keep models and runs in this folder, and use its models again")
    parser.add_argument("--json", type=Path, help="write every step of every run there")
    parser.add_argument("--record", action="store_true", help="write the tables into benchmarks/RESULTS.md")
    add_quick_option(parser)
    options = parser.parse_args()
    options.batch = QUICK_BATCH if options.quick else BATCH
    if options.quick:
        options.scenario, options.steps, options.warm_up, options.rounds = ["longtail", "tool-short"], 2, 1, 1
        options.skip_trl = True
    if not 1 <= options.warm_up < options.steps:
        parser.error("--warm-up has to be at least 1 and smaller than --steps")
    return options


def main() -> None:
    options = _options()
    if options.cores:
        os.sched_setaffinity(0, {int(core) for core in options.cores.split(",")})  # children inherit it
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    command = shlex.join(["python", "benchmarks/step.py", *sys.argv[1:]])
    python = None if options.skip_trl else trl_python(options.python)
    print(f"{command}\n{hardware()}\n", flush=True)
    results, tables = [], []
    with tempfile.TemporaryDirectory() as temporary:
        scratch = (options.scratch or Path(temporary)).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        for scenario in options.scenario:
            results.append(measure(scenario, options, python, scratch))
            tables.append(describe(results[-1]))
            print(f"\n{tables[-1]}", flush=True)
    if options.quick:
        print(QUICK)
    if options.json:
        document = {"command": command, "hardware": hardware(), "scenarios": results}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.record:
        record(REPO / "benchmarks" / "RESULTS.md", command, tables)


if __name__ == "__main__":
    main()
