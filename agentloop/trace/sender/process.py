"""The sender process, from the side of the run: `serving.main` runs in it."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired
from typing import IO, Any

from agentloop.errors import ConfigError, ExportError
from agentloop.trace.exporting import ExportRun, TracedEpisode
from agentloop.trace.sender.images import SentImages
from agentloop.trace.sender.wire import line, packed, read_line

LOG = "logs/{}.log"
"""What the process prints, in the run directory."""

NICENESS = 19
"""Of the process where the operating system has no class for idle cores."""

CLOSE_S = 2.0

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables of libraries that otherwise reserve memory for each core."""


class SenderProcess:
    """Sends the episodes of one destination in a process of its own.

    The process is started when it is first needed, and again if it died. Beside a run that goes on
    it computes only while a core is idle. It ends when this process does.

    Args:
        name: the destination, as messages name it.
        module: has the function `sender(settings, run)`, which returns a `serving.Sender`.
        settings: for that function: JSON. They go through a pipe, so that a key in them is in no
            list of processes.
        run: messages of the libraries go to a file in its directory.
        images: send the images of messages too; without, senders see that there was one.
    """

    def __init__(
        self, name: str, module: str, settings: Mapping[str, Any], run: ExportRun, *, images: bool = False
    ) -> None:
        self._name = name
        self._module = module
        self._first = line({"settings": settings, "run": {**asdict(run), "folder": str(run.folder)}})
        self._log = run.folder / LOG.format(name)
        self._yields = run.live
        self._images = SentImages() if images else None
        self._child: _Child | None = None
        self._lock = threading.Lock()
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The number of the process; None before the first episodes are sent."""
        return None if self._child is None else self._child.process.pid

    def send(self, episodes: Sequence[TracedEpisode]) -> None:
        """Send episodes, and wait for the answer of the receiver.

        Raises:
            ConfigError: the process cannot work with the environment that it has.
            ExportError: not all of them arrived, or the process ended.
        """
        child = self._running()
        records = [packed(episode, self._reference) for episode in episodes]
        answer = child.ask(line({"images": self._new_images(), "episodes": records}))
        if answer.get("config"):
            raise ConfigError(answer["error"], answer["hint"])
        if "error" in answer:
            raise ExportError(answer["error"], answer["hint"], final=answer["final"])

    def finish(self) -> None:
        """Compute like any other process from now on: the run has ended, and waits for this one."""
        with self._lock:
            self._yields = False
            if self._child is not None:
                _take_cores(self._child.process.pid)

    def close(self) -> None:
        """End the process; a request that runs fails."""
        with self._lock:
            self._closed = True
            if self._child is not None:
                self._child.close()

    def _running(self) -> _Child:
        with self._lock:
            if self._closed:
                raise ExportError(f"{self._name}: the exporter is closed")
            if self._child is None or self._child.process.poll() is not None:
                if self._child is not None:
                    self._child.close()
                if self._images is not None:
                    self._images.forget()
                self._child = _Child(self._name, self._module, self._first, self._log, yields=self._yields)
            return self._child

    def _reference(self, value: Any) -> Any:
        return None if self._images is None else self._images.reference(value)

    def _new_images(self) -> dict[str, str]:
        if self._images is None:
            return {}
        new, self._images.new = self._images.new, {}
        return new


class _Child:
    """One process, from its start to its end.

    Raises:
        ExportError: it cannot be started.
    """

    def __init__(self, name: str, module: str, first: bytes, log: Path, *, yields: bool) -> None:
        self._name = name
        self._log = log
        self._first = first
        code = f"from agentloop.trace.sender.serving import main; main({os.getpid()}, {module!r})"
        variables = dict.fromkeys(THREADS, "1") | dict(os.environ)
        with contextlib.ExitStack() as stack:
            try:
                errors: IO[bytes] | int = stack.enter_context(log.open("ab")) if log.parent.is_dir() else DEVNULL
                # A group of its own: Ctrl-C ends the run, which then sends what it still has. Not a
                # session: Linux may share the cores among sessions first, whatever the priority of
                # the processes in them.
                self.process = Popen(
                    [sys.executable, "-P", "-c", code],
                    stdin=PIPE, stdout=PIPE, stderr=errors, process_group=0, env=variables,
                )  # fmt: skip
            except OSError as exc:
                raise ExportError(f"{name}: its process cannot be started: {exc}") from exc
        if yields:
            _leave_cores(self.process.pid)

    def ask(self, request: bytes) -> dict[str, Any]:
        """Return the answer to a request.

        Raises:
            ExportError: the process ended.
        """
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(self._first + request)
            stdin.flush()
            self._first = b""
            answer: dict[str, Any] = read_line(stdout.readline())
        except (OSError, ValueError) as exc:
            with contextlib.suppress(TimeoutExpired):  # its pipes are closed before its status is there
                self.process.wait(CLOSE_S)
            code = self.process.poll()
            self.process.kill()  # one that only closed its pipes is of no use
            status = "" if code is None else f" with status {code}"
            raise ExportError(f"{self._name}: its process ended{status}", f"see {self._log}") from exc
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait(CLOSE_S)
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()


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
