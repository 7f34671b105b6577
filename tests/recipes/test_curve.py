"""Curves of runs: read, drawn as an SVG that a browser takes, checked against bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from recipes import curve


def run(folder: Path, rewards: list[float | None], **evaluations: float) -> Path:
    folder.mkdir()
    lines: list[dict[str, Any]] = [{"step": 0, "eval/reward_mean": 0.1}]
    lines += [{"step": step, "reward/mean": reward} for step, reward in enumerate(rewards, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def program(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["curve", *arguments])
    return curve.main()


def test_runs_become_lines_of_one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = run(tmp_path / "a", [0.2, None, 0.9]), run(tmp_path / "b<", [0.3, 0.8])
    out = tmp_path / "curve.svg"
    assert program(monkeypatch, str(a), str(b), "--out", str(out), "--title", "rewards & more") == 0
    texts = [element.text for element in ElementTree.parse(out).iter() if element.tag.endswith("text")]  # noqa: S314  # ours
    assert "rewards & more" in texts and "a: 0.20 to 0.55" in texts and "b<: 0.30 to 0.55" in texts


@pytest.mark.parametrize(
    ("rewards", "code", "says"),
    [
        ([0.2, *[0.9] * 5], 0, ""),
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
    assert says in capsys.readouterr().err


def test_a_folder_without_rewards_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path / "nothing", run(tmp_path / "r", [None])):
        with pytest.raises(SystemExit):
            program(monkeypatch, str(folder))
        assert "metrics.jsonl" in capsys.readouterr().err
