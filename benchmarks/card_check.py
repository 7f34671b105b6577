"""All that only a card can show, in one run of at most twelve minutes: `make gpu-check`.

    python benchmarks/card_check.py [--sglang-python .venv-sglang/bin/python] [--only step mfu] [--json FILE]

kernels    the flash kernels, and a step of the trainer in bf16, against the CPU's (`tests/trainer/test_gpu.py`)
engine     the evaluation of a small model by the torch engine on the card
step       one whole step, torch engine and trainer on the card in bf16: they agree about logprobs
sglang     the evaluation by SGLang on the card
colocated  two steps with SGLang and trainer in turns: the second is sampled by an engine that was woken up, and agrees
mfu        the share of the card's peak that the trainer reaches (`train_card.py`)

Each part is a process with a time limit of its own. A part that fails or takes too long does not keep the others from
running. `--dry-run` runs them on the CPU as far as that makes sense: without the kernels and without SGLang, whose
parts run the torch engine. Its numbers mean nothing.

Exit code 1: a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quick import QUICK, add_quick_option, expect

REPO = Path(__file__).resolve().parents[1]
RECIPE = REPO / "recipes" / "quickstart" / "recipe.yaml"
LIMIT_S = 12 * 60
APART = 0.05
"""Largest mean difference of a logprob between engine and trainer, both in bf16."""

Verdict = Callable[[Path, str], str]
"""(folder of the part, its output) -> what is wrong; empty: nothing."""


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        limit_s: seconds after which it is killed; on a card, those of all parts together are at most LIMIT_S.
        why_not: why it does not run here; empty: it does.
    """

    name: str
    command: list[str]
    limit_s: int
    verdict: Verdict
    why_not: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a part ended: `fault` is empty if it passed or did not run."""

    name: str
    seconds: float
    fault: str
    skipped: str
    tail: str


def parts_of(folder: Path, *, dry: bool, sglang: Path | None) -> list[Part]:
    """Return the parts in their order: what others build on first."""
    torch_engine = ["rollout.engine=torch"]
    other_engine = torch_engine if dry else ["rollout.engine=sglang", f"rollout.python={sglang}"]
    no_sglang = "" if dry or sglang is not None else "no environment of SGLang: make sglang, or --sglang-python"
    device, dtype = ("cpu", "float32") if dry else ("cuda", "bfloat16")
    on_card = [f"model.dtype={dtype}", f"rollout.device={device}"]
    trains = [*on_card, f"trainer.device={device}", "eval.before_train=false", "eval.every=null"]
    turns = ["rollout.colocated=true", "rollout.max_staleness=0"]

    def agentloop(command: str, *options: str) -> list[str]:
        program = [sys.executable, "-m", "agentloop.commands.main", command, "--config", str(RECIPE)]
        return [*program, *options]

    def train(name: str, steps: int, *options: str) -> list[str]:
        return agentloop("train", f"run.dir={folder / name}", f"run.steps={steps}", *trains, *options)

    def evaluate(name: str, engine: list[str]) -> list[str]:
        return agentloop("eval", "--out", str(folder / name), *on_card, *engine, "eval.max_rows=64")

    tests = ["-m", "pytest", "-q", "-m", "gpu", "-k", "not whole_loop", str(REPO / "tests" / "trainer" / "test_gpu.py")]
    # A dry run may share its cores with others; it only must not hang.
    patience = 10 if dry else 1
    mfu = [str(REPO / "benchmarks" / "train.py"), "--device", "cuda", *(["--dry-run"] if dry else [])]
    return [
        Part("kernels", [sys.executable, *tests], 100, ran, "needs a card" if dry else ""),
        Part("engine", evaluate("engine", torch_engine), 80 * patience, evaluated),
        Part("step", train("step", 1, *torch_engine), 80 * patience, agreed(1)),
        Part("sglang", evaluate("sglang", other_engine), 150 * patience, evaluated, no_sglang),
        Part("colocated", train("colocated", 2, *other_engine, *turns), 150 * patience, agreed(2), no_sglang),
        Part("mfu", [sys.executable, *mfu], 160 * patience, ran),
    ]


def ran(folder: Path, output: str) -> str:
    """Judge by the exit code alone."""
    return ""


def agreed(steps: int) -> Verdict:
    """Judge a run: all steps are there, each moved the policy, and engine and trainer agree in each."""

    def verdict(folder: Path, output: str) -> str:
        file = folder / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        rows = [row for row in rows if "train/grad_norm" in row]
        if len(rows) != steps:
            return f"{len(rows)} of {steps} steps in {file}"
        if not all(row["train/grad_norm"] > 0 for row in rows):
            return "a step has no gradient"
        apart = max(row["mismatch/logprob_abs_mean"] for row in rows)
        return "" if apart < APART else f"engine and trainer differ by {apart:.3f} in the mean of a logprob"

    return verdict


def evaluated(folder: Path, output: str) -> str:
    """Judge an evaluation: it wrote its result."""
    return "" if (folder / "eval.json").is_file() else f"no {folder / 'eval.json'}"


def run(part: Part, folder: Path) -> Outcome:
    """Run a part; everything that it started is gone afterwards."""
    if part.why_not:
        return Outcome(part.name, 0.0, "", part.why_not, "")
    log = folder / f"{part.name}.log"
    begin = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(part.command, cwd=REPO, stdout=output, stderr=output, start_new_session=True)
        try:
            code: int | None = process.wait(part.limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    seconds, text = time.monotonic() - begin, log.read_text(errors="replace")
    fault = f"took more than {part.limit_s} s" if code is None else f"exit code {code}" if code else ""
    fault = fault or part.verdict(folder / part.name, text)
    return Outcome(part.name, seconds, fault, "", text[-3000:])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the group of a process that may have left others behind."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def check(parts: Sequence[Part], folder: Path) -> list[Outcome]:
    """Run the parts one after the other, and say how each ended."""
    outcomes = []
    for part in parts:
        outcome = run(part, folder)
        outcomes.append(outcome)
        word = f"not run: {outcome.skipped}" if outcome.skipped else outcome.fault or "passed"
        print(f"{part.name:10} {outcome.seconds:6.1f} s  {word}", flush=True)
        if outcome.fault:
            print(outcome.tail, flush=True)
        elif part.name == "mfu" and not outcome.skipped:
            shown = (line for line in outcome.tail.splitlines() if line.startswith(("|", "**", "peak")))
            print("\n".join(shown), flush=True)
    return outcomes


def _sglang_python(named: Path | None) -> Path | None:
    found = named or REPO / ".venv-sglang" / "bin" / "python"
    return found.absolute() if found.exists() else None


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in parts_of(Path(), dry=True, sglang=None)]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="run these parts only")
    parser.add_argument("--sglang-python", type=Path, help="SGLang's interpreter; default: .venv-sglang's")
    parser.add_argument("--json", type=Path, help="write how each part ended there")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, as far as that makes sense")
    add_quick_option(parser)
    return parser.parse_args(arguments)


def main() -> int:
    options = _options()
    dry = options.dry_run or options.quick
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        parts = parts_of(folder, dry=dry, sglang=_sglang_python(options.sglang_python))
        assert dry or sum(part.limit_s for part in parts) <= LIMIT_S
        outcomes = check([part for part in parts if part.name in options.only], folder)
    rows: list[dict[str, Any]] = [asdict(outcome) for outcome in outcomes]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    failed = [outcome.name for outcome in outcomes if outcome.fault]
    if options.quick:
        expect("parts that failed", failed, [])
        print(QUICK)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
