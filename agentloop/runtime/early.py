"""Start Python programs before it is known what they shall do: they import their modules meanwhile.

Importing torch and transformers takes seconds. `importing` starts a process that does so at the
first moment of a command (agentloop/runtime/importer.py). `early_programs` decides what it becomes
once the recipe is known: programs with equal environments are forked from one such process, so
that their modules are imported once; others have a process each. Until `begin_early` sends
arguments, environment and log of a program, a process also imports what only some of its programs
need. Without one that fits, or when it has ended, programs are started as usual
(agentloop/runtime/child.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from agentloop.runtime.importer import SIZE_BYTES
from agentloop.runtime.variables import child_environment

if TYPE_CHECKING:
    import asyncio

HEAVY = ("torch", "transformers.modeling_utils", "transformers.generation.utils", "agentloop.config")
"""What every program with a model imports."""

AT_EXEC = (
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "GLIBC_TUNABLES", "LD_PRELOAD", "LD_LIBRARY_PATH",
    "PYTHONPATH",
)  # fmt: skip
"""Variables that are read when a program starts or imports: an early program must have had them."""

ROOT = str(Path(__file__).resolve().parents[2])
"""Where this package is imported from; early programs import it from there too."""

PADDING = 1024
"""Characters of the longest command line that `ps` shows for an early program."""

FORK_S = 180.0
"""Longest wait for a program to be forked: what is still being imported may lie on a slow disk."""

KILL_S = 5.0

PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37


class Process(Protocol):
    """What `subprocess.Popen` and `ForkedProcess` have in common."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while the process runs."""
        ...

    def kill(self) -> None: ...


@dataclass(frozen=True)
class EarlyProgram:
    """A module to run with `python -m`, and what it imports meanwhile.

    Attributes:
        imports: beside `HEAVY`, if the program needs that; as many as there is time for.
        environment: the whole environment.
        heavy: whether it imports `HEAVY`.
        forks: whether it may be forked from a process that has imported that.
    """

    module: str
    imports: Sequence[str]
    environment: Mapping[str, str]
    heavy: bool = True
    forks: bool = True


class ForkedProcess:
    """A child that another process has forked for this one."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # somebody else has collected it
                pid, status = self.pid, 1 << 8
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def kill(self) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, 9)


class Importer:
    """A process that imports, seen from here.

    Attributes:
        programs: how many it has still to fork off.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.programs = 0
        self._began = _at_exec(environment)
        self._lock: asyncio.Lock | None = None
        self._control, theirs = socket.socketpair()
        self._control.setblocking(False)
        with theirs:
            path = os.pathsep.join(filter(None, [ROOT, environment.get("PYTHONPATH")]))
            words = [str(theirs.fileno()), str(os.getpid())]
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "agentloop.runtime.importer", *words, " " * PADDING],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**environment, "PYTHONPATH": path},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def fits(self, environment: Mapping[str, str]) -> bool:
        """Whether a program with this environment may run in the process, which still runs."""
        return self._began == _at_exec(environment) and self._control.fileno() >= 0 and self.process.poll() is None

    def imports(self, names: Sequence[str], *, meanwhile: bool = False) -> None:
        """Import modules after those that were named before.

        Args:
            meanwhile: only until a program is to be run or forked off.
        """
        with contextlib.suppress(OSError):  # it has ended, which `begin` finds
            self._control.sendall(_message({"meanwhile" if meanwhile else "import": list(names)}))

    async def begin(self, order: dict[str, Any]) -> tuple[Process, socket.socket | None] | None:
        """Let the process run a program, or fork it off; None if it has ended or does not fork.

        Returns:
            The program's process, and our end of its socket if its arguments name one.
        """
        import asyncio  # here, because the first importer starts before the command has imported anything

        self._lock = self._lock or asyncio.Lock()
        ours, theirs = socket.socketpair() if order["passes_socket"] else (None, None)
        pid = 0
        try:
            async with self._lock:
                with contextlib.suppress(OSError, TimeoutError):
                    pid = await self._send(order, theirs)
        finally:
            if theirs is not None:
                theirs.close()
            if pid == 0:
                self.end()
                if ours is not None:
                    ours.close()
        if pid == 0:
            return None
        self.programs -= 1
        if not order["fork"]:
            self._control.close()
            return self.process, ours
        if self.programs == 0:
            self.end()
        return ForkedProcess(pid), ours

    async def _send(self, order: dict[str, Any], theirs: socket.socket | None) -> int:
        """Send a program; return its process id, 0 if there is none."""
        import asyncio

        loop = asyncio.get_running_loop()
        if self._control.fileno() < 0:
            return 0
        async with asyncio.timeout(FORK_S):
            with _adopting() if order["fork"] else contextlib.nullcontext():
                await loop.sock_sendall(self._control, _message({"program": order}))
                if theirs is not None:
                    socket.send_fds(self._control, [b"\0"], [theirs.fileno()])
                if not order["fork"] and self.process.poll() is None:
                    return self.process.pid  # it takes the program when it has imported
                answer = b""
                while len(answer) < SIZE_BYTES and (more := await loop.sock_recv(self._control, SIZE_BYTES)):
                    answer += more
        return int.from_bytes(answer)

    def end(self) -> None:
        """Kill the process. One that is stuck in the kernel is left behind."""
        self._control.close()
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(KILL_S)


@dataclass
class _Early:
    program: EarlyProgram
    importer: Importer
    forks: bool


_waiting: list[_Early] = []
_first: list[Importer] = []


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import `HEAVY` in a process that `early_programs` uses within the block; killed at its end.

    Programs with more than one thread do not fit it.
    """
    importer = Importer(child_environment(1))
    importer.imports(HEAVY)
    _first.append(importer)
    try:
        yield
    finally:
        if importer in _first:
            _first.remove(importer)
            importer.end()


@contextlib.contextmanager
def early_programs(programs: Sequence[EarlyProgram]) -> Iterator[None]:
    """Start programs that wait for `begin_early`. Those that it has not taken are killed at the end
    of the block."""
    started: list[_Early] = []
    try:
        for group in _groups(programs):
            importer = _importer(group[0])
            started += [_Early(program, importer, forks=len(group) > 1) for program in group]
            importer.programs = len(group)
            importer.imports([name for program in group for name in program.imports], meanwhile=True)
        for importer in _first:  # of no use to these programs
            importer.end()
        _first.clear()
        _waiting.extend(started)
        yield
    finally:
        for early in started:
            if early in _waiting:
                _waiting.remove(early)
                early.importer.end()
            elif early.forks:
                early.importer.end()


def _groups(programs: Sequence[EarlyProgram]) -> list[list[EarlyProgram]]:
    """Divide programs into those that share a process that imports."""
    shared: dict[tuple[str | None, ...], list[EarlyProgram]] = {}
    single: list[list[EarlyProgram]] = []
    for program in programs:
        if program.heavy and program.forks and sys.platform == "linux":
            shared.setdefault(_at_exec(program.environment), []).append(program)
        else:
            single.append([program])
    return [*shared.values(), *single]


def _importer(program: EarlyProgram) -> Importer:
    """Return the process that has imported since the command began if it fits, else a new one."""
    if program.heavy:
        for importer in _first:
            if importer.fits(program.environment):
                _first.remove(importer)
                return importer
    importer = Importer(program.environment)
    if program.heavy:
        importer.imports(HEAVY)
    return importer


async def begin_early(
    module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path
) -> tuple[Process, socket.socket | None] | None:
    """Let a waiting program run `module`; None if there is none that fits.

    Args:
        arguments: of the module. `{fd}` becomes the number of the program's end of a socket.
        environment: the whole environment.
        log: takes what the program prints from now on; appended to.

    Returns:
        The process, and our end of the socket, if there is one.
    """
    for early in list(_waiting):
        if early.program.module != module or not early.importer.fits(environment):
            continue
        _waiting.remove(early)
        order = {
            "module": module,
            "arguments": list(arguments),
            "environment": dict(environment),
            "log": str(log.absolute()),
            "passes_socket": any("{fd}" in word for word in arguments),
            "fork": early.forks,
        }
        if (begun := await early.importer.begin(order)) is not None:
            return begun
    return None


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """Let orphans of this process's children become its own children."""
    libc, was = ctypes.CDLL(None), _subreaper()
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, was, 0, 0, 0)


def _subreaper() -> int:
    value = ctypes.c_int()
    ctypes.CDLL(None).prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(value), 0, 0, 0)
    return value.value


def _at_exec(environment: Mapping[str, str]) -> tuple[str | None, ...]:
    """Return the variables that count when a program starts. `ROOT` comes first in any case."""
    values = {key: environment.get(key) for key in AT_EXEC}
    folders = (values["PYTHONPATH"] or "").split(os.pathsep)
    values["PYTHONPATH"] = os.pathsep.join(folder for folder in folders if folder != ROOT) or None
    return tuple(values.values())


def _message(body: dict[str, Any]) -> bytes:
    text = json.dumps(body).encode()
    return len(text).to_bytes(SIZE_BYTES) + text
