"""The training benchmarks: what can be tried without a card, and without another trainer's environment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.mark.benchmark
def test_the_cards_benchmark_can_be_tried_without_one(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "train.py"), "--device", "cuda", "--dry-run"]
    done = subprocess.run([*command, "--json", str(tmp_path / "rows.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["tokens"] for row in rows] == [512]
    assert all(0.8 * row["tokens"] <= row["packed"] <= row["tokens"] and row["share"] > 0 for row in rows)


@pytest.mark.usefixtures("benchmarks")
def test_both_trainers_get_the_same_trajectories_with_the_longest_among_them() -> None:
    from trajectories import trajectories
    from workload import GROUP, LONGTAIL_MAX

    few, all_of_them = trajectories("longtail", 4, step=0), trajectories("longtail", 32, step=0)
    assert few == trajectories("longtail", 4, step=0) != trajectories("longtail", 4, step=1)
    assert (len(few), len(all_of_them)) == (4 * GROUP, 32 * GROUP)
    assert max(len(row.completion) for row in few) == max(len(row.completion) for row in all_of_them) == LONGTAIL_MAX
    assert {len({row.reward for row in few[i : i + GROUP]}) for i in range(0, len(few), GROUP)} == {2}
    assert {len({tuple(row.prompt) for row in few[i : i + GROUP]}) for i in range(0, len(few), GROUP)} == {1}


@pytest.mark.usefixtures("benchmarks")
def test_lengths_and_waits_of_the_other_benchmark_are_quantiles() -> None:
    import importlib

    spread = importlib.import_module("async").spread
    drawn = spread(1000, 2.0, 0.5, seed=3)
    assert drawn == spread(1000, 2.0, 0.5, seed=3) != spread(1000, 2.0, 0.5, seed=4)
    assert sorted(drawn)[500] == pytest.approx(2.0, rel=0.01)
