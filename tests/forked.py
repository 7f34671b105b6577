"""Programs that need torch, forked from one process of the tests that has imported it.

A start of such a program takes five seconds of CPU, nearly all of which is the import of torch and
transformers. Commands import them once for all programs that they start
(agentloop/runtime/early.py); the tests do so once for all tests of a process.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from agentloop.runtime import early
from agentloop.runtime.early import HEAVY, SIZE_BYTES, EarlyProgram, ForkedProcess, Importer
from agentloop.runtime.variables import child_environment

ROOT = Path(__file__).parents[1]
PROGRAMS = ("rollout_server.launch", "rollout_server.engines.torch_engine.create", "trainer.learner.learner")
"""What the programs import beside torch and transformers."""

IMPORT_S = 180.0
POLL_S = 0.01


class _Origin(Importer):
    """The process that has imported. It forks programs as long as the tests run."""

    def __init__(self) -> None:
        self.environment = child_environment(1)
        with contextlib.chdir(ROOT):
            super().__init__(self.environment)
        self.imports([*HEAVY, *PROGRAMS])
        atexit.register(self.end)

    def fork(self, module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> ForkedProcess:
        order = {
            "module": module, "arguments": list(arguments), "environment": dict(environment), "log": str(log),
            "passes_socket": False, "fork": True,
        }  # fmt: skip
        self._control.settimeout(IMPORT_S)
        try:
            with early._adopting():
                self._control.sendall(early._message({"program": order}))
                answer = b""
                while len(answer) < SIZE_BYTES:
                    more = self._control.recv(SIZE_BYTES - len(answer))
                    assert more, "the process that imports has ended"
                    answer += more
        finally:
            self._control.setblocking(False)
        pid = int.from_bytes(answer)
        assert pid, "the process that imports does not fork: it has several threads"
        return ForkedProcess(pid)


_origins: list[_Origin] = []


def _origin(environment: Mapping[str, str]) -> _Origin | None:
    """The process to fork from; None if a program with this environment needs its own start."""
    if sys.platform != "linux":
        return None
    if not (_origins and _origins[-1].process.poll() is None):
        _origins.append(_Origin())
    return _origins[-1] if _origins[-1].fits(environment) else None


class Forked:
    """A forked program, with what tests use of `subprocess.Popen`."""

    def __init__(self, process: ForkedProcess) -> None:
        self._process = process
        self.pid = process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    def poll(self) -> int | None:
        return self._process.poll()

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self._process.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            time.sleep(POLL_S)
        return code

    def send_signal(self, number: int) -> None:
        if self._process.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    module: str, arguments: Sequence[str], log: Path, more: Mapping[str, str] = {}
) -> Forked | subprocess.Popen[bytes]:
    """Start `python -P -m module` in the repository's root with one thread.

    Args:
        log: takes what it prints.
        more: variables of its environment beside those of this process.
    """
    environment = {**child_environment(1), **more}
    log.write_bytes(b"")
    if (origin := _origin(environment)) is not None:
        return Forked(origin.fork(module, arguments, environment, log.absolute()))
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments], stdout=output, stderr=output, cwd=ROOT, env=environment
        )


@contextlib.contextmanager
def forking(programs: Sequence[EarlyProgram]) -> Iterator[None]:
    """As `early_programs`, with one process that imports for all tests."""
    if not programs or (origin := _origin(programs[0].environment)) is None:
        with early.early_programs(programs):
            yield
        return
    origin._lock = None  # of an earlier test's event loop
    origin.programs += len(programs) + 1  # it goes on after the last of them
    waiting = [early._Early(program, origin, forks=True) for program in programs]
    early._waiting.extend(waiting)
    try:
        yield
    finally:
        for program in waiting:
            if program in early._waiting:
                early._waiting.remove(program)
