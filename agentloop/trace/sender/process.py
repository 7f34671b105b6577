"""`SpanSender`: the run's side of the process that sends its episodes."""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired
from typing import IO, Any

from agentloop.config import TraceConfig
from agentloop.errors import DiskError, TraceError
from agentloop.text import clean
from agentloop.trace.backlog import Backlog, push_command
from agentloop.trace.exporting import Destination, ExportRun
from agentloop.trace.exports import ExportLog, RecordUnavailable
from agentloop.trace.store import TraceFile, TraceStore

LOG = "logs/spans.log"
"""What the process prints, in the run directory."""

CLOSE_TIMEOUT_S = 10.0
"""How long the end of a run waits for what is still to be sent."""

CLOSE_S = 2.0
"""Beyond it, until the process is killed; for its death; and to count what was not sent, to all
destinations together."""

CLOSE_BUSY_S = 0.5
"""How long that count waits for another process that writes the record of what was sent."""

MOST_STARTS = 5
"""Of the process in one run; one that keeps dying takes memory from the run each time."""

MOST_DEATHS = 3
"""Of the process while it sends the same file, which is then left out."""

LONGEST_CAUSE = 300
MOST_CAUSES = 3
"""Of files that could not be counted: characters of a message, and messages."""

NICENESS = 19
"""Of the process where the operating system has no class for idle cores."""

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables of libraries that otherwise reserve memory for each core."""


File = tuple[int, str]
"""Step and split of a trace file."""


class SpanSender:
    """Sends the episodes of a run to its destinations, in a process of its own.

    The run only names each trace file that it wrote; the process reads it, and adds it to the index
    of the traces as well. Nothing here waits for it. It computes only while a core is idle, until
    the run ends, and ends with the run. If it dies, it is started again at the next `report`, and
    begins with other files than the one that it was sending.

    Args:
        destinations: of `config`; may be empty, then nothing is done.
        config: goes to the process through a pipe, so that a key in it is in no list of processes
            and in no file.
        run: the run, whose folder keeps the record of what was sent.
        warn: called from `report` and `close`, in the caller's thread.
        yields: leave the cores to the run; False: compute like any other process.
    """

    def __init__(
        self,
        destinations: Sequence[Destination],
        config: TraceConfig,
        run: ExportRun,
        *,
        warn: Callable[[str], None],
        yields: bool = True,
    ) -> None:
        self._destinations = destinations
        self._run = run
        self._warn = warn
        self._yields = yields
        sections = config.model_dump(mode="json", include={"otlp", "weave", "exporters"})
        self._first = _line({"trace": sections, "run": {**asdict(run), "folder": str(run.folder)}})
        self._unsent: dict[str, dict[File, None]] = {one.name: {} for one in destinations}
        self._at: dict[str, File] = {}  # what each destination's thread is sending
        self._deaths: Counter[File] = Counter()  # of the process while it sent a file
        self._unnoted: dict[str, set[str]] = {}  # trace ids that arrived, and are not in the record
        self._to_say: deque[str] = deque()
        self._said: set[str] = set()
        self._lock = threading.Lock()
        self._starts = 0
        self._child: _Child | None = None
        if destinations:
            self._start()

    @property
    def active(self) -> bool:
        """Whether there is a destination, and so a process."""
        return bool(self._destinations)

    @property
    def pid(self) -> int | None:
        """The number of the process; None while there is none."""
        return None if self._child is None else self._child.process.pid

    def submit(self, step: int, split: str) -> None:
        """Send what the trace file of a step holds; never waits. Any thread may call it."""
        with self._lock:
            for files in self._unsent.values():
                files[step, split] = None
            if self._child is not None:
                self._child.write(_line_of(step, split))

    def report(self) -> None:
        """Say what went wrong since the last time."""
        with self._lock:
            self._listen()
            if self._child is None and self._destinations:
                self._start()
        while self._to_say:
            self._warn(self._to_say.popleft())

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> dict[str, int]:
        """Wait for what is still to be sent, at most `timeout_s` long and `CLOSE_S` for its end;
        return the number of episodes that each destination does not have."""
        self.report()
        end = time.monotonic() + timeout_s + CLOSE_S
        with self._lock:
            if self._child is not None:
                self._child.finish(timeout_s)
            while self._child is not None and (left := end - time.monotonic()) > 0:
                self._child.wait(left)
                self._listen(ending=True)
            if self._child is not None:
                self._child.close()
            missing = self._count_missing()
            self._destinations, self._child = (), None
        self.report()
        for name, (count, causes) in missing.items():
            if count or causes:
                self._warn(self._left(name, count, causes))
        return {name: count for name, (count, _) in missing.items()}

    def _start(self) -> None:
        """Start the process, and name to it all that was not sent."""
        if self._starts == MOST_STARTS:
            self._say(
                f"the process that sends spans was started {MOST_STARTS} times and is not started again; "
                f"{self._consequence()}"
            )
            return
        self._starts += 1
        try:
            self._child = _Child(self._run.folder / LOG, yields=self._yields)
        except OSError as exc:
            self._say(f"the process that sends spans cannot be started: {exc}; {self._consequence()}")
            return
        self._child.write(self._first)
        files = dict.fromkeys(file for files in self._unsent.values() for file in files)
        # One that ended the process is not to keep the others from being sent.
        for file in sorted(files, key=lambda file: self._deaths[file]):
            if self._deaths[file] < MOST_DEATHS:
                self._child.write(_line_of(*file))

    def _listen(self, *, ending: bool = False) -> None:
        """Take the messages of the process, and note its end."""
        if self._child is None:
            return
        for message in self._child.messages():
            if "say" in message:
                self._say(message["say"])
            elif "unnoted" in message:
                self._unnoted[message["unnoted"]] = set(message["ids"])
            elif "at" in message:
                self._at[message["at"]] = message["step"], message["split"]
            else:
                self._unsent[message["done"]].pop((message["step"], message["split"]), None)
                self._at.pop(message["done"], None)
        if (status := self._child.status()) is not None:
            self._child.close()
            self._child = None
            if not (ending and status == 0):
                log = self._run.folder / LOG
                self._say(f"the process that sends spans ended with status {status} (see {log}); {self._consequence()}")
                self._note_death()

    def _note_death(self) -> None:
        for step, split in set(self._at.values()):
            self._deaths[step, split] += 1
            if self._deaths[step, split] == MOST_DEATHS:
                path = TraceStore(self._run.folder).path(step, split)
                self._say(
                    f"the process that sends spans ended {MOST_DEATHS} times while it sent {path}, which is left out; "
                    f"{self._consequence()}"
                )
        self._at.clear()

    def _consequence(self) -> str:
        commands = " and ".join(push_command(name, self._run) for name in self._unsent)
        return f"the run continues, and its episodes are kept in the run directory: {commands}"

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._to_say.append(text)

    def _count_missing(self) -> dict[str, tuple[int, list[str]]]:
        """Return by destination the number of episodes that it does not have, and why there may be
        more: files that could not be counted."""
        log = ExportLog(self._run.folder / "traces", warn=self._say, busy_timeout_s=CLOSE_BUSY_S)
        end = time.monotonic() + CLOSE_S
        found = {one.name: self._missing(one, log, end) for one in self._destinations}
        log.close()
        return found

    def _missing(self, destination: Destination, log: ExportLog, end: float) -> tuple[int, list[str]]:
        backlog, count, causes = Backlog(destination, self._run, log), 0, list[str]()
        unnoted = self._unnoted.get(destination.name, set())
        for step, split in self._unsent[destination.name]:
            if time.monotonic() > end:
                causes.append("it took too long to count them")
                break
            try:
                file = TraceFile(step, split, backlog.store.path(step, split))
                count += len(backlog.missing(file).trace_ids - unnoted)
            except RecordUnavailable as exc:
                causes.append(exc.message)
                break
            except (TraceError, DiskError) as exc:
                causes.append(exc.message)
        return count, causes

    def _left(self, name: str, count: int, causes: Sequence[str]) -> str:
        """Return what to say of episodes that a destination does not have."""
        least = "at least " if causes else ""
        text = f"{least}{count:,} episodes were not sent" if count else "it is not known whether all episodes were sent"
        if causes:
            text += f" ({'; '.join(clean(cause, LONGEST_CAUSE) for cause in causes[:MOST_CAUSES])}"
            text += f"; and {len(causes) - MOST_CAUSES:,} more files)" if len(causes) > MOST_CAUSES else ")"
        return f"trace.{name}: {text}; all are in the run directory: {push_command(name, self._run)}"


class _Child:
    """One process, from its start to its end. Nothing waits for it, but `wait` and `close`.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, log: Path, *, yields: bool) -> None:
        code = f"from agentloop.trace.sender.serving import main; main({os.getpid()})"
        variables = dict.fromkeys(THREADS, "1") | dict(os.environ)
        with contextlib.ExitStack() as stack:
            errors: IO[bytes] | int = stack.enter_context(log.open("ab")) if log.parent.is_dir() else DEVNULL
            # A group of its own: Ctrl-C ends the run, which then sends what it still has. Not a
            # session: Linux may share the cores among sessions first, whatever the priority of the
            # processes in them.
            self.process = Popen(
                [sys.executable, "-P", "-c", code],
                stdin=PIPE, stdout=PIPE, stderr=errors, bufsize=0, process_group=0, env=variables,
            )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        self._stdin, self._stdout = self.process.stdin, self.process.stdout
        for pipe in (self._stdin, self._stdout):
            os.set_blocking(pipe.fileno(), False)
        self._out, self._rest = bytearray(), b""
        self._ended = False
        if yields:
            _leave_cores(self.process.pid)

    def write(self, line: bytes) -> None:
        """Send a line, now or when the process reads."""
        self._out += line
        self._flush()

    def messages(self) -> list[dict[str, Any]]:
        """Return what the process has said since the last time."""
        self._flush()
        data = [self._rest]
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self._stdout.fileno(), 2**16):
                data.append(part)
            self._ended = True
        *lines, self._rest = b"".join(data).split(b"\n")
        return [json.loads(line) for line in lines]

    def finish(self, timeout_s: float) -> None:
        """Tell the process that the run has ended, and waits for it."""
        self.write(_line({"finish": timeout_s}))
        _take_cores(self.process.pid)

    def wait(self, timeout_s: float) -> None:
        """Wait until there is something to read, room to write, or the status of the process."""
        if self._ended:
            with contextlib.suppress(TimeoutExpired):
                self.process.wait(timeout_s)
            return
        poll = select.poll()
        poll.register(self._stdout, select.POLLIN)
        if self._out:
            poll.register(self._stdin, select.POLLOUT)
        poll.poll(1000 * timeout_s)

    def status(self) -> int | None:
        """Return the status of the process; None: it runs, or has not quite ended. Where no core is
        idle, its end takes a while."""
        if not self._ended:
            return None
        self.process.kill()  # one that only closed its pipes is of no use
        return self.process.poll()

    def close(self) -> None:
        """End the process if it has not ended."""
        self.process.kill()
        with contextlib.suppress(TimeoutExpired):
            self.process.wait(CLOSE_S)
        for pipe in (self._stdin, self._stdout):
            with contextlib.suppress(OSError):
                pipe.close()

    def _flush(self) -> None:
        with contextlib.suppress(OSError):  # it does not read now, or has ended
            while self._out:
                del self._out[: os.write(self._stdin.fileno(), self._out)]


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _line_of(step: int, split: str) -> bytes:
    return _line({"step": step, "split": split})


def _leave_cores(pid: int) -> None:
    """Let a process compute only while a core is idle: sending may wait."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))
            return
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, NICENESS)


def _take_cores(pid: int) -> None:
    """Undo `_leave_cores`, where the operating system lets this user do so."""
    with contextlib.suppress(OSError):
        if sys.platform == "linux":
            for thread in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setscheduler(int(thread.name), os.SCHED_OTHER, os.sched_param(0))
        else:
            os.setpriority(os.PRIO_PROCESS, pid, 0)
