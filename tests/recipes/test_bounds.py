"""How far the reward of a run rose, against bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes import bounds


def run(folder: Path, rewards: list[float | None], *evaluations: float) -> Path:
    folder.mkdir()
    lines: list[dict[str, Any]] = [{"step": 0, "eval/reward_mean": 0.1}]
    lines += [{"step": step, "reward/mean": reward} for step, reward in enumerate(rewards, 1)]
    lines += [{"step": len(rewards), "eval/reward_mean": reward} for reward in evaluations]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def program(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["bounds", *arguments])
    return bounds.main()


@pytest.mark.parametrize(
    ("rewards", "code", "says"),
    [
        ([0.2, *[0.9] * 5], 0, ""),
        ([0.2, None, *[0.9] * 5], 0, ""),
        ([0.4, *[0.9] * 5], 1, "the first step has a reward of 0.400, not below 0.35"),
        ([0.2, 0.9, *[0.7] * 5], 1, "the last 5 steps have 0.700, not above 0.8"),
    ],
)
def test_a_bound_that_is_missed_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rewards: list[float | None],
    code: int,
    says: str,
) -> None:
    folder = run(tmp_path / "r", rewards)
    assert program(monkeypatch, str(folder), "--starts-below", "0.35", "--ends-above", "0.8") == code
    out, err = capsys.readouterr()
    assert says in err and " steps" in out


def test_a_control_must_not_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(run(tmp_path / "r", [0.1, *[0.2] * 5]))
    assert program(monkeypatch, folder, "--ends-below", "0.25") == 0
    assert program(monkeypatch, folder, "--ends-below", "0.2") == 1
    assert "the last 5 steps have 0.200, not below 0.2" in capsys.readouterr().err


def test_a_folder_without_rewards_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path / "nothing", run(tmp_path / "r", [None])):
        with pytest.raises(SystemExit):
            program(monkeypatch, str(folder))
        assert "metrics.jsonl" in capsys.readouterr().err


def test_evaluations_are_bounded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(run(tmp_path / "r", [0.2, 0.9], 0.9))
    assert program(monkeypatch, folder, "--evaluated-from", "0.1", "--evaluated-to", "0.9") == 0
    assert "evaluated 0.100 -> 0.900" in capsys.readouterr().out
    assert program(monkeypatch, folder, "--evaluated-to", "0.95") == 1
    assert "the last evaluation is 0.900, below 0.95" in capsys.readouterr().err
    assert program(monkeypatch, folder, "--evaluated-from", "0.05") == 1
    assert "the first evaluation is 0.100, above 0.05" in capsys.readouterr().err
    assert program(monkeypatch, str(run(tmp_path / "once", [0.2])), "--evaluated-to", "0.5") == 1
    assert "evaluated less than twice" in capsys.readouterr().err
