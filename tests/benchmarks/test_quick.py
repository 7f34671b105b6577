"""No benchmark may rot: each runs with `--quick`, which checks that its workload is what it says, not its time."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

PARTS = {"loop_worker.py", "canned_server.py"}
"""Programs that a benchmark starts; they run with it."""

ELSEWHERE = {"loop_overhead.py": "test_loop_overhead.py", "rollout.py": "test_rollout.py"}
"""Benchmarks that another test runs with `--quick`."""

QUICK = [
    "async.py",
    "card_check.py",
    "import_time.py",
    "matmul.py",
    "publish.py",
    "retrieval.py",
    "router.py",
    "sandbox.py",
    "scale_model.py",
    "startup.py",
    "step.py",
    "trace.py",
    "trace_spans.py",
    "trace_step.py",
    "trace_viewer.py",
    "train.py",
    "vision.py",
    "workers.py",
]


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / name), "--quick", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "QUICK: the workload is as described" in done.stdout
    return done.stdout


def test_every_benchmark_is_among_those_that_are_run() -> None:
    programs = {path.name for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    assert programs - PARTS == {*QUICK, *ELSEWHERE, "token_law.py"}
    for test in ELSEWHERE.values():
        assert '"--quick"' in Path(__file__).with_name(test).read_text(encoding="utf-8")


@pytest.mark.benchmark
@pytest.mark.parametrize("name", QUICK)
def test_a_benchmark_measures_what_it_says(name: str, tmp_path: Path) -> None:
    run(name, *(["--folder", str(tmp_path)] if name == "publish.py" else []))


@pytest.mark.benchmark
def test_random_turns_are_as_many_as_asked_for(shared: Path) -> None:
    folders = ["--tokenizer", str(shared / "tokenizers" / "qwen"), "--templates", str(shared / "chat_templates")]
    run("token_law.py", *folders, "--template", "qwen2_5", "qwen3")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_a_step_of_another_size_is_refused(module: Any) -> None:
    """This is what `ignore_eos` did when end tokens were not ignored: 2,693 tokens instead of 16,384."""
    step, workload = module("step"), module("workload")
    work = workload.Workload("equal", [], [], [64] * 256)
    fine = {
        "episode/count": 256,
        "episode/failed": 0,
        "episode/rejected": 0,
        "rollout/tokens": 16_384,
        "episode/response_tokens_max": 64,
    }
    step.check_our_work(work, [fine])
    for key, value in {"rollout/tokens": 2693, "episode/count": 255, "episode/rejected": 1}.items():
        with pytest.raises(SystemExit, match=r"the workload is not what it says: equal: .* not"):
            step.check_our_work(work, [fine, fine | {key: value}])


def test_episodes_that_are_cut_short_are_refused(module: Any) -> None:
    bench = module("async")
    sampled = sum(bench.turn_lengths())
    fine = {
        "episode/count": 256,
        "episode/failed": 0,
        "episode/rejected": 0,
        "episode/turns_mean": 2.0,
        "rollout/tokens": sampled,
        "episode/response_tokens_mean": sampled / 256 + bench.TOOL_TOKENS + 8,
        "staleness/max": 1,
    }
    bench.check_work([fine], 1)
    for change in ({"rollout/tokens": sampled - 1}, {"episode/turns_mean": 1.9}, {"staleness/max": 0}):
        with pytest.raises(SystemExit, match="the workload is not what it says"):
            bench.check_work([fine | change], 1)
