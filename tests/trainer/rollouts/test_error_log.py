"""Exceptions of user code: shown once, all of them written, within a bound."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentloop.faults import Fault
from trainer.rollouts import error_log
from trainer.rollouts.error_log import ErrorLog


def fault(line: int = 3, error: str = "KeyError: 'boom'") -> Fault:
    return Fault("the reward", error, f"/r.py:{line}", f'  File "/r.py", line {line}, in score\n    x["boom"]')


def test_the_first_of_each_kind_is_shown_and_all_are_written(tmp_path: Path) -> None:
    shown: list[str] = []
    log = ErrorLog(tmp_path / "logs" / "errors.jsonl", shown.append)
    (tmp_path / "logs").mkdir()
    for number in range(3):
        log(fault(), str(number), f"g{number}/0")
    log(fault(line=9), "7", "g7/1")
    assert len(shown) == 2
    assert (
        "the reward raised KeyError: 'boom' (row 0, group g0, sample 0" in shown[0]
        and f"agentloop trace list {tmp_path} --status failed" in shown[0]
        and '"/r.py", line 3, in score' in shown[0]
    )
    lines = [json.loads(line) for line in (tmp_path / "logs" / "errors.jsonl").read_text().splitlines()]
    assert [(line["row"], line["episode"], line["count"]) for line in lines] == [
        ("0", "group g0, sample 0", 1), ("1", "group g1, sample 0", 2), ("2", "group g2, sample 0", 3),
        ("7", "group g7, sample 1", 1),
    ]  # fmt: skip
    assert (
        lines[0]["kind"] == "KeyError at /r.py:3"
        and "in score" in lines[0]["traceback"]
        and "traceback" not in lines[1]
    )


def test_file_and_console_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(error_log, "MOST_BYTES", 4000)
    shown: list[str] = []
    log = ErrorLog(tmp_path / "errors.jsonl", shown.append)
    for number in range(200):
        log(fault(line=number % 50, error="KeyError: \ud800"), "0", "g0/0")
    assert len(shown) == error_log.MOST_SHOWN
    assert 4000 <= (tmp_path / "errors.jsonl").stat().st_size <= 8000


def test_a_file_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    shown: list[str] = []
    log = ErrorLog(tmp_path / "missing" / "errors.jsonl", shown.append)
    log(fault(), "0", "g0/0")
    log(fault(line=9), "0", "g0/0")
    assert sum("cannot be written" in text for text in shown) == 1
