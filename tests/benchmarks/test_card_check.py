"""What `make gpu-check` runs on a card: its parts, its limits and its verdicts, without one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def card_check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import card_check

    return card_check


def test_all_parts_together_fit_twelve_minutes(card_check: Any, tmp_path: Path) -> None:
    for dry in (False, True):
        parts = card_check.parts_of(tmp_path, dry=dry, sglang=Path("python"))
        assert [part.name for part in parts] == ["kernels", "engine", "step", "sglang", "colocated", "mfu"]
        assert dry or sum(part.limit_s for part in parts) <= 12 * 60
        assert [part.name for part in parts if part.why_not] == (["kernels"] if dry else [])


def test_on_a_card_every_part_is_on_it_and_sglang_is_named(card_check: Any, tmp_path: Path) -> None:
    parts = {part.name: part.command for part in card_check.parts_of(tmp_path, dry=False, sglang=Path("/s/python"))}
    for name in ("engine", "step", "sglang", "colocated"):
        assert {"rollout.device=cuda", "model.dtype=bfloat16"} <= {*parts[name]}
        assert ("rollout.python=/s/python" in parts[name]) == (name in ("sglang", "colocated"))
    assert "trainer.device=cuda" in parts["step"] and "trainer.device=cuda" in parts["colocated"]
    assert "rollout.colocated=true" in parts["colocated"] and "--dry-run" not in parts["mfu"]
    without = {part.name: part.why_not for part in card_check.parts_of(tmp_path, dry=False, sglang=None)}
    assert "make sglang" in without["sglang"] and "make sglang" in without["colocated"] and not without["step"]


def test_a_part_that_takes_too_long_is_ended_with_what_it_started(card_check: Any, tmp_path: Path) -> None:
    program = f"sleep 600 & echo $! >{tmp_path / 'child'}; wait"
    outcome = card_check.run(card_check.Part("slow", ["sh", "-c", program], 1, card_check.ran), tmp_path)
    assert outcome.fault == "took more than 1 s"
    child = int((tmp_path / "child").read_text())
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_part_that_fails_does_not_keep_the_next_from_running(
    card_check: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = card_check.Part("first", [sys.executable, "-c", "print('why'); raise SystemExit(3)"], 60, card_check.ran)
    passing = card_check.Part("second", [sys.executable, "-c", ""], 60, card_check.ran)
    skipped = card_check.Part("third", ["false"], 60, card_check.ran, "needs a card")
    outcomes = card_check.check([failing, passing, skipped], tmp_path)
    assert [(one.fault, one.skipped) for one in outcomes] == [("exit code 3", ""), ("", ""), ("", "needs a card")]
    shown = capsys.readouterr().out
    assert "why" in shown and "not run: needs a card" in shown


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([], "0 of 2 steps"),
        ([{"train/grad_norm": 1.0, "mismatch/logprob_abs_mean": 0.01}] * 2, ""),
        ([{"train/grad_norm": 1.0, "mismatch/logprob_abs_mean": 0.2}] * 2, "differ by 0.200"),
        ([{"train/grad_norm": 0.0, "mismatch/logprob_abs_mean": 0.0}] * 2, "no gradient"),
        ([{"eval/reward": 1.0}, {"train/grad_norm": 1.0, "mismatch/logprob_abs_mean": 0.0}], "1 of 2 steps"),
    ],
)
def test_a_run_is_judged_by_its_metrics(card_check: Any, tmp_path: Path, rows: list[Any], fault: str) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + os.linesep for row in rows))
    found = card_check.agreed(2)(tmp_path, "")
    assert (fault in found) if fault else found == ""
