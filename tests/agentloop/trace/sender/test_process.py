"""The sender process: it reads what the run wrote, keeps secrets to itself, leaves the cores to the run, and ends."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from agentloop.config import TraceConfig
from agentloop.registry import registered
from agentloop.trace.backlog import Backlog
from agentloop.trace.exporting import ExportRun, load_destinations
from agentloop.trace.exports import ExportLog, RecordUnavailable
from agentloop.trace.index import TraceIndex
from agentloop.trace.index.database import NAME as INDEX
from agentloop.trace.sender import SpanSender
from agentloop.trace.sender import process as process_module
from agentloop.trace.sender.memory import MEMORY_BYTES
from agentloop.trace.store import TraceFile, TraceStore
from tests.agentloop.trace.damaged_files import DAMAGES
from tests.agentloop.trace.made_episodes import step_of
from tests.agentloop.trace.otlp_receiver import Receiver

SECRET = "Bearer very-secret"

MADE = """
import os, resource, time

class Made:
    destination = "here"

    def __init__(self, config, run):
        print("noise of a constructor", flush=True)
        self._folder, self._options = run.folder, config.options

    def export(self, episodes):
        print("noise of a library", flush=True)
        if any(episode.main.step == self._options.get("dies_at") for episode in episodes):
            os.kill(os.getpid(), 9)
        (self._folder / "limit").write_text(str(resource.getrlimit(resource.RLIMIT_AS)[0]))
        while (self._folder / "hold").exists():
            time.sleep(0.01)
        with (self._folder / "got").open("a") as file:
            file.writelines(f"{episode.key} {self._options}\\n" for episode in episodes)

    def close(self, timeout_s):
        (self._folder / "closed").touch()
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExportRun:
    monkeypatch.setenv("WANDB_API_KEY", "local")  # else weave is refused
    (tmp_path / "run" / "logs").mkdir(parents=True)
    return ExportRun("demo", tmp_path / "run", "models/small", rollout_n=2)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An exporter `made` of another package."""
    folder = tmp_path / "package"
    information = folder / "made-1.dist-info"
    information.mkdir(parents=True)
    (folder / "made_exporter.py").write_text(MADE)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: made\nVersion: 1\n")
    (information / "entry_points.txt").write_text("[agentloop.traces]\nmade = made_exporter:Made\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    registered.cache_clear()
    yield
    registered.cache_clear()
    sys.modules.pop("made_exporter", None)


@pytest.fixture
def start(run: ExportRun) -> Iterator[Callable[..., tuple[SpanSender, list[str]]]]:
    senders: list[SpanSender] = []

    def start(*, yields: bool = False, **trace: Any) -> tuple[SpanSender, list[str]]:
        # Where other tests leave no core idle, a process that yields would not get anywhere.
        config, said = TraceConfig.model_validate(trace), list[str]()
        senders.append(SpanSender(load_destinations(config, run), config, run, warn=said.append, yields=yields))
        return senders[-1], said

    yield start
    for sender in senders:
        sender.close(0)


def write(run: ExportRun, sender: SpanSender, *steps: int, groups: int = 2) -> None:
    for step in steps:
        TraceStore(run.folder).write(step, "train", step_of(step, groups))
        sender.submit(step, "train")


def wait_for(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.01)


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def test_spans_arrive_and_the_secrets_of_the_recipe_are_nowhere_else(
    receiver: Receiver, run: ExportRun, start: Any
) -> None:
    sender, said = start(otlp={"endpoint": receiver.url, "headers": {"authorization": SECRET}})
    write(run, sender, 1)
    wait_for(lambda: len(receiver.spans) == 4 * 9, "the spans")
    assert receiver.requests[0][1]["authorization"] == SECRET
    process = Path("/proc") / str(sender.pid)
    if process.exists():
        assert b"very-secret" not in (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
    receiver.status, receiver.answer = 401, SECRET.encode()
    write(run, sender, 2)
    assert sender.close() == {"otlp": 4}
    assert "answered 401" in said[0] and "trace.otlp: 4 episodes were not sent" in said[1] and len(said) == 2
    assert all(f"agentloop trace push --to otlp {run.folder}" in text for text in said)
    assert not any("very-secret" in text for text in said)
    for path in run.folder.rglob("*"):
        assert not path.is_file() or b"very-secret" not in path.read_bytes(), path


@pytest.mark.usefixtures("made")
def test_an_exporter_of_another_package_works_in_the_process(run: ExportRun, start: Any) -> None:
    sender, said = start(exporters=[{"name": "made", "options": {"a": 1}, "max_groups_per_step": 1}])
    write(run, sender, 1, 2)
    assert sender.close(60) == {"made": 0} and not said
    got = (run.folder / "got").read_text().splitlines()
    assert len(got) == 4 and {line.partition(" ")[2] for line in got} == {"{'a': 1}"}
    assert (run.folder / "closed").exists()
    assert (run.folder / "limit").read_text() == "-1", "what it needs is not known"
    log = (run.folder / "logs" / "spans.log").read_text()
    assert "noise of a constructor" in log and "noise of a library" in log
    assert ExportLog(run.folder / "traces").counts() == {"made here": 4}


@pytest.mark.usefixtures("made")
def test_it_indexes_what_the_run_wrote(run: ExportRun, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sender, _ = start(exporters=[{"name": "made"}])
    write(run, sender, 1, 2)
    sender.close(60)
    monkeypatch.setattr("agentloop.trace.index.index.read_rows", None)  # a viewer has nothing left to read
    index = TraceIndex(run.folder)
    assert not index.refresh() and index.query().total == 8


@pytest.mark.usefixtures("made")
def test_an_index_that_cannot_be_written_stops_nothing(run: ExportRun, start: Any) -> None:
    (run.folder / "traces" / INDEX).mkdir(parents=True)
    sender, said = start(exporters=[{"name": "made"}])
    write(run, sender, 1, 2)
    assert sender.close(60) == {"made": 0} and not said


@pytest.mark.usefixtures("made")
def test_a_killed_process_is_said_once_and_replaced_and_nothing_is_lost(run: ExportRun, start: Any) -> None:
    sender, said = start(exporters=[{"name": "made"}])
    (run.folder / "hold").touch()
    write(run, sender, 1)
    wait_for((run.folder / "limit").exists, "the first batch")
    for step in (2, 3):
        killed = sender.pid
        os.kill(killed, signal.SIGKILL)
        write(run, sender, step)
        wait_for(lambda killed=killed: (sender.report(), sender.pid not in (None, killed))[1], "another process")
    (text,) = said
    assert "ended with status -9" in text and "spans.log" in text and "the run continues" in text
    assert f"agentloop trace push --to made {run.folder}" in text
    (run.folder / "hold").unlink()
    assert sender.close(60) == {"made": 0} and len(said) == 1
    assert len((run.folder / "got").read_text().splitlines()) == 12


def test_a_process_that_keeps_dying_is_given_up(
    run: ExportRun, start: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text("raise SystemExit(7)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    sender, said = start(otlp={"endpoint": "http://127.0.0.1:9"})
    started = [sender.pid]
    write(run, sender, 1)
    while started[-1] is not None:
        wait_for(lambda: (sender.report(), sender.pid != started[-1])[1], "its end")
        started.append(sender.pid)
    assert len(started) == process_module.MOST_STARTS + 1
    assert len(said) == 2 and "ended with status" in said[0]
    assert "is not started again" in said[1] and f"agentloop trace push --to otlp {run.folder}" in said[1]
    for _ in range(3):
        sender.report()
    assert sender.close() == {"otlp": 4} and "4 episodes were not sent" in said[2] and len(said) == 3


@pytest.mark.usefixtures("made")
def test_a_file_that_ends_the_process_does_not_keep_the_others_from_being_sent(run: ExportRun, start: Any) -> None:
    sender, said = start(exporters=[{"name": "made", "options": {"dies_at": 1}}])
    write(run, sender, 1, 2)

    def arrived(step: int) -> bool:
        sender.report()
        got = run.folder / "got"
        return got.exists() and f"train/{step}/" in got.read_text()

    wait_for(lambda: arrived(2), "the step after it")
    wait_for(lambda: (sender.report(), any("is left out" in text for text in said))[1], "its last death")
    write(run, sender, 3)
    wait_for(lambda: arrived(3), "a later step")
    assert sender.close(60) == {"made": 4}
    assert "ended with status -9" in said[0] and "4 episodes were not sent" in said[2] and len(said) == 3
    assert str(TraceStore(run.folder).path(1, "train")) in said[1] and "trace push --to made" in said[1]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_file_that_is_damaged_behind_its_footer_does_not_count_as_sent(
    receiver: Receiver, run: ExportRun, start: Any, damage: Callable[[Path], None]
) -> None:
    sender, said = start(otlp={"endpoint": receiver.url})
    os.kill(sender.pid, signal.SIGSTOP)
    write(run, sender, 1, 2)
    damage(TraceStore(run.folder).path(1, "train"))
    os.kill(sender.pid, signal.SIGCONT)
    assert sender.close(60) == {"otlp": 0} and len(receiver.spans) == 4 * 9
    assert len(said) == 2 and all("step_1/train.parquet" in text and "trace push" in text for text in said)
    assert "it is not known whether all episodes were sent" in said[1]


def test_a_locked_record_keeps_no_run_from_starting_or_ending(receiver: Receiver, run: ExportRun, start: Any) -> None:
    ExportLog(run.folder / "traces").check_writable()
    other = sqlite3.connect(run.folder / "traces" / "exports.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    ExportLog(run.folder / "traces")
    begin = time.monotonic()
    sender, said = start(otlp={"endpoint": receiver.url}, weave={"project": "lab/runs"})
    write(run, sender, 1, 2, 3)
    # What was written before could be counted, what a destination has of it could not.
    assert sender.close(0.1) == {"otlp": 0, "weave": 0}
    assert time.monotonic() - begin < 8
    for name in ("otlp", "weave"):
        (text,) = [text for text in said if text.startswith(f"trace.{name}: it is not known whether")]
        assert "database is locked" in text and f"agentloop trace push --to {name}" in text
    other.close()


def test_an_error_of_the_record_at_the_end_leaves_what_was_counted(
    run: ExportRun, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    sender, said = start(otlp={"endpoint": "http://127.0.0.1:9"})
    write(run, sender, 1, 2)
    missing = Backlog.missing

    def locked(self: Backlog, file: TraceFile) -> Any:
        if file.step == 2:
            raise RecordUnavailable("exports.sqlite: database is locked")
        return missing(self, file)

    monkeypatch.setattr(Backlog, "missing", locked)
    assert sender.close(0) == {"otlp": 4}
    assert "trace.otlp: at least 4 episodes were not sent (exports.sqlite: database is locked)" in said[-1]


def test_counting_at_the_end_has_one_bound_for_all_destinations(
    run: ExportRun, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, said = start(otlp={"endpoint": "http://127.0.0.1:9"}, weave={"project": "lab/runs"})
    os.kill(sender.pid, signal.SIGSTOP)
    write(run, sender, 1, 2)
    monkeypatch.setattr(process_module, "CLOSE_S", 0.0)
    assert sender.close(0) == {"otlp": 0, "weave": 0}
    for name in ("otlp", "weave"):
        assert any(text.startswith(f"trace.{name}: it is not known") and "too long" in text for text in said)


def test_the_run_waits_neither_for_a_process_that_stands_still_nor_long_at_its_end(
    receiver: Receiver, run: ExportRun, start: Any
) -> None:
    sender, said = start(otlp={"endpoint": receiver.url})
    pid = sender.pid
    os.kill(pid, signal.SIGSTOP)
    write(run, sender, 1)
    begin = time.monotonic()
    for _ in range(5_000):  # more than a pipe holds
        sender.submit(1, "train")
    sender.report()
    assert time.monotonic() - begin < 20
    begin = time.monotonic()
    assert sender.close(0.1) == {"otlp": 4}
    assert time.monotonic() - begin < 20
    wait_for(lambda: has_ended(pid), "its end")
    assert "4 episodes were not sent" in said[-1]


def test_without_destinations_nothing_happens(run: ExportRun, start: Any) -> None:
    sender, said = start()
    sender.submit(1, "train")
    sender.report()
    assert sender.pid is None and sender.close() == {} and not said and not (run.folder / "traces").exists()


def test_a_log_that_cannot_be_written_is_said_and_the_run_goes_on(run: ExportRun, start: Any) -> None:
    (run.folder / "logs" / "spans.log").mkdir()
    sender, said = start(otlp={"endpoint": "http://127.0.0.1:9", "timeout_s": 1})
    write(run, sender, 1)
    sender.report()
    assert len(said) == 1 and "cannot be started" in said[0] and "spans.log" in said[0] and "trace push" in said[0]
    (run.folder / "logs" / "spans.log").rmdir()
    assert sender.close(60) == {"otlp": 4}
    assert "cannot be reached: Connection refused" in said[1], "it was started when that was possible"


@pytest.mark.parametrize("content", [b"no database " * 100, b"SQLite format 3\0" + b"x" * 5000])
def test_a_damaged_record_of_exports_is_moved_aside(
    receiver: Receiver, run: ExportRun, start: Any, content: bytes
) -> None:
    path = run.folder / "traces" / "exports.sqlite"
    path.parent.mkdir()
    path.write_bytes(content)
    sender, said = start(otlp={"endpoint": receiver.url})
    write(run, sender, 1)
    assert sender.close(60) == {"otlp": 0}
    assert path.with_name("exports.sqlite.damaged").read_bytes() == content
    assert len(said) == 1 and "exports.sqlite.damaged" in said[0]
    assert ExportLog(path.parent).counts() == {f"otlp {receiver.url}/v1/traces": 4}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no class for idle cores")
@pytest.mark.parametrize("yields", [True, False])
def test_it_computes_on_idle_cores_only_until_the_run_ends(run: ExportRun, start: Any, yields: bool) -> None:
    sender, _ = start(otlp={"endpoint": "http://127.0.0.1:9"}, yields=yields)
    assert os.sched_getscheduler(sender.pid) == (os.SCHED_IDLE if yields else os.SCHED_OTHER)
    assert os.getsid(sender.pid) == os.getsid(0), "a session of its own would have a share of its own"
    assert os.getpgid(sender.pid) != os.getpgid(0), "Ctrl-C is for the run"
    os.kill(sender.pid, signal.SIGSTOP)  # else it ends
    sender._child.finish(60)
    if os.geteuid() == 0:  # others may not raise a priority
        threads = [int(folder.name) for folder in Path(f"/proc/{sender.pid}/task").iterdir()]
        assert {os.sched_getscheduler(thread) for thread in threads} == {os.SCHED_OTHER}
    os.kill(sender.pid, signal.SIGCONT)
    assert sender.close(60) == {"otlp": 0}


RUN = """
import json, os, sys, time
from pathlib import Path
from agentloop.config import TraceConfig
from agentloop.trace.exporting import ExportRun, load_destinations
from agentloop.trace.index import TraceIndex
from agentloop.trace.index.database import NAME as INDEX
from agentloop.trace.sender import SpanSender
run = ExportRun("demo", Path(sys.argv[1]))
config = TraceConfig.model_validate(json.loads(sys.argv[2]))
sender = SpanSender(load_destinations(config, run), config, run, warn=print, yields=False)
sender.submit(1, "train")
other = os.fork()  # a program of the run that outlives it, with a copy of its pipes
if other:
    print(sender.pid, other, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("name", ["otlp", "weave"])
def test_it_ends_with_a_run_that_is_killed_while_a_receiver_hangs(run: ExportRun, name: str) -> None:
    if name == "weave":
        pytest.importorskip("weave")
    TraceStore(run.folder).write(1, "train", step_of(1, 2))
    listener = socket.create_server(("127.0.0.1", 0))  # it takes connections and never answers
    listener.settimeout(120)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    section = {"endpoint": url, "timeout_s": 1000} if name == "otlp" else {"project": "lab/runs"}
    parent = subprocess.Popen(
        [sys.executable, "-c", RUN, str(run.folder), json.dumps({name: section})],
        env=os.environ | {"WANDB_BASE_URL": url, "WF_TRACE_SERVER_URL": url, "WANDB_API_KEY": "local"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pid, other = map(int, parent.stdout.readline().split())
    child = os.pidfd_open(pid)
    connection, _ = listener.accept()  # the process waits for an answer
    limits = Path(f"/proc/{pid}/limits").read_text()
    limit = int(next(line for line in limits.splitlines() if line.startswith("Max address space")).split()[3])
    assert MEMORY_BYTES < limit < 2 * MEMORY_BYTES
    parent.kill()
    parent.wait()
    ended, _, _ = select.select([child], [], [], 30)
    os.kill(other, signal.SIGKILL)
    if not ended:
        signal.pidfd_send_signal(child, signal.SIGKILL)
    for closing in (connection, listener, parent.stdout):
        closing.close()
    os.close(child)
    assert ended
