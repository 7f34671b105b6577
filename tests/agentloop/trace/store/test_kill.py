"""`kill -9` in the middle of a write: the file is there as it was before, or not at all, and it is said."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from agentloop.report import write_report
from agentloop.trace.store import TraceStore
from tests.agentloop.trace.store.support import step_records

CHILD = """
import runpy, sys, time
from pathlib import Path
import agentloop.trace.store.writer as writer
from agentloop.trace.store import TraceStore

step_records = runpy.run_path(sys.argv[3])["step_records"]
encode = writer.encode

def slow(chunk, digests):  # a large step: one row group is on the disk while the next is prepared
    if encoded:
        print("in the middle", flush=True)
        time.sleep(600)
    encoded.append(chunk)
    return encode(chunk, digests)

encoded = []
writer.encode = slow
writer.ROW_GROUP_BYTES = 4000
TraceStore(Path(sys.argv[1])).write(int(sys.argv[2]), "train", step_records(int(sys.argv[2]), tokens=4000))
"""


def killed_write(run: Path, step: int) -> None:
    """Start a process that writes a step's trace, and kill it in the middle."""
    command = [sys.executable, "-c", CHILD, str(run), str(step), str(Path(__file__).with_name("support.py"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in the middle\n"
        process.kill()
        assert process.wait() == -signal.SIGKILL


def test_what_was_written_before_stays_and_what_is_missing_is_said(tmp_path: Path) -> None:
    store = TraceStore(tmp_path)
    store.write(1, "train", step_records(1, failed={(0, 0)}))
    killed_write(tmp_path, 2)
    assert store.steps("train") == [1]
    assert len(store.records(1, "train")) == 8
    (problem,) = store.problems()
    assert re.fullmatch(r"train\.parquet\..+\.tmp", problem.path.name) and problem.path.parent.name == "step_2"
    assert problem.path.stat().st_size > 1000, "it was killed while it wrote"
    assert "not complete" in write_report(tmp_path).read_text(encoding="utf-8")
    assert "server lost" in write_report(tmp_path).read_text(encoding="utf-8")

    store.rewind(1)
    assert store.problems() == [] and not problem.path.exists()


def test_a_killed_rewrite_leaves_the_earlier_file(tmp_path: Path) -> None:
    store = TraceStore(tmp_path)
    store.write(2, "train", step_records(2, groups=1))
    before = store.path(2, "train").read_bytes()
    killed_write(tmp_path, 2)
    assert store.path(2, "train").read_bytes() == before
    assert len(store.records(2, "train")) == 2
    begin = time.time_ns()
    store.write(2, "train", step_records(2))  # over what the killed process left
    assert store.path(2, "train").stat().st_mtime_ns >= begin - 10**9
    assert len(store.records(2, "train")) == 8 and store.problems() == []
