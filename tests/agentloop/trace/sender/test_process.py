"""The sender process: it sends, keeps secrets to itself, leaves the cores to the run, and ends."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from agentloop.config import OtlpConfig
from agentloop.errors import ExportError
from agentloop.trace.exporting import ExportRun, episodes_of
from agentloop.trace.otlp import OtlpExporter
from agentloop.trace.sender import SenderProcess
from tests.agentloop.trace.made_episodes import step_of
from tests.agentloop.trace.otlp_receiver import Receiver

SECRET = "Bearer very-secret"


@pytest.fixture
def run(tmp_path: Path) -> ExportRun:
    (tmp_path / "logs").mkdir()
    return ExportRun("demo", tmp_path, "models/small", rollout_n=2)


def test_spans_arrive_through_the_process_and_its_secrets_are_nowhere_else(receiver: Receiver, run: ExportRun) -> None:
    exporter = OtlpExporter(OtlpConfig(endpoint=receiver.url, headers={"authorization": SECRET}), run)
    try:
        exporter.export(episodes_of(run, step_of(1, 2)))
        assert len(receiver.spans) == 4 * 9 and receiver.requests[0][1]["authorization"] == SECRET
        process = Path("/proc") / str(exporter._process.pid)
        if process.exists():
            assert b"very-secret" not in (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        receiver.status, receiver.answer = 401, SECRET.encode()
        with pytest.raises(ExportError, match="answered 401") as caught:
            exporter.export(episodes_of(run, step_of(2, 1)))
        assert "very-secret" not in str(caught.value) and "headers" in str(caught.value.hint)
    finally:
        begin = time.monotonic()
        exporter.close(1.0)
    assert time.monotonic() - begin < 3
    assert "very-secret" not in (run.folder / "logs" / "otlp.log").read_text()
    with pytest.raises(ExportError, match="is closed"):
        exporter.export([])


def test_a_killed_process_is_named_with_its_status_and_replaced_at_once(receiver: Receiver, run: ExportRun) -> None:
    exporter = OtlpExporter(OtlpConfig(endpoint=receiver.url), run)
    try:
        child = exporter._process._running()
        child.process.kill()
        with pytest.raises(ExportError, match="ended with status -9"):
            child.ask(b"{}\n")
        exporter.export(episodes_of(run, step_of(1, 1)))
        assert receiver.spans
    finally:
        exporter.close(1.0)


SENDER = """
import resource

class Sender:
    def send(self, episodes, images):
        print("noise of a library", flush=True)
        if episodes:
            raise MemoryError

def sender(settings, run):
    print("noise of an import", flush=True)
    assert resource.getrlimit(resource.RLIMIT_AS)[0] > 0
    return Sender()
"""


def test_prints_are_not_answers_and_a_process_without_memory_ends(
    run: ExportRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_sender.py").write_text(SENDER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = SenderProcess("made", "made_sender", {}, run)
    try:
        process.send([])
        first = process.pid
        with pytest.raises(ExportError, match="ended with status 1") as caught:
            process.send(episodes_of(run, step_of(1, 1)))
        assert not caught.value.final
        process.send([])
        assert process.pid != first, "the next process begins anew"
    finally:
        process.close()
    log = (run.folder / "logs" / "made.log").read_text()
    assert "noise of a library" in log and "noise of an import" in log and "MemoryError" in log


def test_a_log_that_cannot_be_written_is_an_outage(run: ExportRun) -> None:
    (run.folder / "logs" / "otlp.log").mkdir()
    exporter = OtlpExporter(OtlpConfig(endpoint="http://127.0.0.1:9"), run)
    with pytest.raises(ExportError, match=r"cannot be started: .*otlp\.log") as caught:
        exporter.export([])
    assert not caught.value.final


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no class for idle cores")
@pytest.mark.parametrize("live", [True, False])
def test_beside_a_run_it_computes_on_idle_cores_only_until_that_ends(run: ExportRun, live: bool) -> None:
    exporter = OtlpExporter(OtlpConfig(endpoint="http://127.0.0.1:9"), replace(run, live=live))
    try:
        pid = exporter._process._running().process.pid
        assert os.sched_getscheduler(pid) == (os.SCHED_IDLE if live else os.SCHED_OTHER)
        assert os.getsid(pid) == os.getsid(0), "a session of its own would have a share of its own"
        assert os.getpgid(pid) != os.getpgid(0), "Ctrl-C is for the run"
        exporter.finish()
        if os.geteuid() == 0:  # others may not raise a priority
            threads = [int(folder.name) for folder in Path(f"/proc/{pid}/task").iterdir()]
            assert {os.sched_getscheduler(thread) for thread in threads} == {os.SCHED_OTHER}
    finally:
        exporter.close(1.0)
