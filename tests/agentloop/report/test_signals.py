"""The report names what looks wrong, with the episodes behind it."""

from __future__ import annotations

from pathlib import Path

import orjson

from agentloop.report import write_report
from agentloop.trace.store import TraceStore
from tests.agentloop.trace.signals.support import GROUPS, SAMPLES, record, row


def write(run_dir: Path, answer: str | None, steps: int = 10) -> str:
    lines = []
    for step in range(1, steps + 1):
        records = [record(step, group, sample) for group in range(GROUPS) for sample in range(SAMPLES)]
        for made in records:
            made.trajectory.answer = answer or made.trajectory.answer
        TraceStore(run_dir).write(step, "train", records)
        lines.append(orjson.dumps(row(step)))
    (run_dir / "metrics.jsonl").write_bytes(b"\n".join(lines))
    return write_report(run_dir).read_text()


def test_a_planted_fault_is_named_with_its_episodes(tmp_path: Path) -> None:
    page = write(tmp_path, "<b>42</b>\x1b[31m")
    section = page[page.index('id="signals"') : page.index("How to read the samples")]
    assert 'class="card signal alarm"' in section
    assert "One answer is given to different tasks" in section and "&lt;b&gt;42&lt;/b&gt;␛[31m" in section
    assert "<code>train/10/10-0/0/0</code>" in section
    assert "and 16 more" in section


def test_a_healthy_run_says_that_no_rule_found_anything(tmp_path: Path) -> None:
    page = write(tmp_path, None)
    section = page[page.index('id="signals"') : page.index("How to read the samples")]
    assert "No rule found anything" in section and "article" not in section


def test_a_run_that_is_too_short_does_not_look_healthy(tmp_path: Path) -> None:
    page = write(tmp_path, None, steps=2)
    assert "Too few steps to judge (5 needed, 2 so far)." in page and "No rule found anything" not in page
