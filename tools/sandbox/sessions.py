"""`Sessions`: kernels that keep variables between calls, each with a lease.

A session is a sandbox whose process runs cells in one namespace. It ends when its client closes it,
when it was neither used nor renewed for the time of its lease (a client that died), or when its
kernel does. Between cells all its processes are stopped: an idle session uses memory only.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tools.sandbox.languages import PYTHON
from tools.sandbox.messages import (
    CellRequest,
    CommandStatus,
    RunCodeAnswer,
    RunCodeRequest,
    SessionAnswer,
    SessionRequest,
)
from tools.sandbox.runner import INTERRUPT_S, Runner, WrongRequest, answer
from tools.sandbox.settings import MB
from tools.sandbox.worker import Died, Stopped, Worker

MOST_CHECK_S = 5.0


class NoSuchSession(Exception):
    """There is none of this name: it has ended, or never was."""


class TooManySessions(Exception):
    """As many are open as may be."""


@dataclass(slots=True, eq=False)
class _Session:
    worker: Worker
    memory: int
    lease_s: float
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    used: float = field(default_factory=time.monotonic)
    last: tuple[str, RunCodeAnswer] | None = None


class Sessions:
    """The sessions of a server. Made and closed on the event loop."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._sessions: dict[str, _Session] = {}
        self._opening = 0
        self._idle_s = runner.settings.session_idle_s
        self._reaper = asyncio.create_task(self._end_idle(), name="idle sessions")

    def __len__(self) -> int:
        return len(self._sessions)

    async def open(self, request: SessionRequest) -> SessionAnswer:
        """Start a session.

        Raises:
            WrongRequest: another language than Python, or more memory than is granted.
            TooManySessions: as many are open as may be.
            ToolError: a sandbox could not be started.
        """
        runner = self._runner
        if runner.language(request.language) is not PYTHON:
            raise WrongRequest(f"language {request.language[:40]!r} has no sessions", "open one of python")
        runner.check_limits(request.memory_limit_MB)
        if len(self._sessions) + self._opening >= runner.settings.max_sessions:
            raise TooManySessions

        memory = runner.settings.given_memory(request.memory_limit_MB)
        self._opening += 1
        try:
            worker = await runner.pool.begin(lambda worker: self._job(worker, request), memory)
        finally:
            self._opening -= 1
        name = secrets.token_urlsafe(16)
        lease_s = min(self._idle_s, request.lease_s or self._idle_s)
        self._sessions[name] = _Session(worker, memory, lease_s)
        return SessionAnswer(session_id=name, idle_s=lease_s)

    def renew(self, names: Sequence[str]) -> list[str]:
        """Begin the leases of sessions anew; return those that exist."""
        found = [name for name in names if name in self._sessions]
        for name in found:
            self._sessions[name].used = time.monotonic()
        return found

    async def run(self, name: str, request: RunCodeRequest) -> RunCodeAnswer:
        """Run a cell, after those that came before.

        Raises:
            WrongRequest: what only a program of its own has: another language than Python, stdin,
                other memory than that of the session; or more time than is granted.
            NoSuchSession, QueueFull
        """
        if self._runner.language(request.language) is not PYTHON:
            raise WrongRequest(
                f"language {request.language[:40]!r} is not that of a session, which runs python",
                "leave session_id out: the program then runs on its own; or start it from Python, with subprocess",
            )
        if request.stdin:
            raise WrongRequest("stdin cannot be given to a cell of a session", "write the text into `files`")
        self._runner.check_limits(request.memory_limit_MB, run_timeout=request.run_timeout)
        session = self._found(name)
        if request.memory_limit_MB > 0 and request.memory_limit_MB * MB != session.memory:
            raise WrongRequest(
                f"memory_limit_MB {request.memory_limit_MB} is not that of the session ({session.memory // MB})",
                "give it to POST /sessions",
            )
        await self._runner.pool.acquire(session.lock)
        try:
            # The client may have lost the answer, and ask again.
            if request.request_id is not None and session.last is not None and session.last[0] == request.request_id:
                return session.last[1]
            self._found(name)
            async with self._runner.pool.place():
                try:
                    found = await self._cell(name, session, request)
                    session.last = None if request.request_id is None else (request.request_id, found)
                    return found
                except BaseException:
                    # A client that goes away, or a cell whose end nobody has seen.
                    await self._end(name)
                    raise
                finally:
                    session.used = time.monotonic()
        finally:
            session.lock.release()

    async def close(self, name: str) -> None:
        """End a session, and what runs in it.

        Raises:
            NoSuchSession
        """
        self._found(name)
        await self._end(name)

    async def close_all(self) -> None:
        self._reaper.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reaper
        for name in list(self._sessions):
            await self._end(name)

    def _job(self, worker: Worker, request: SessionRequest) -> dict[str, Any]:
        return {
            "op": "session",
            "sandboxed": self._runner.sandboxed,
            "folder": worker.folder,
            # Cells have a time limit each, which the server keeps.
            "limits": self._runner.limits(PYTHON, request.memory_limit_MB, None),
        }

    async def _cell(self, name: str, session: _Session, request: CellRequest) -> RunCodeAnswer:
        worker = session.worker
        with self._runner.watched(worker, session.memory):
            worker.send(
                {
                    "op": "cell",
                    "code": request.code.encode("utf-8", "surrogatepass"),
                    "files": request.contents(),
                    "fetch": list(request.fetch_files),
                }
            )
            result, event = await self._runner.observed(worker, "done", request.run_timeout)
            ended = event is None or event.name == "ended"
            if result.status is CommandStatus.TIME_LIMIT:
                ended = not await self._interrupted(worker)
                result.stdout = (result.stdout or "") + worker.stdout.take()
                result.stderr = (result.stderr or "") + worker.stderr.take()
                text = "the session has ended, its variables are gone" if ended else "the variables are kept"
                result.stderr += f"[sandbox: stopped after {request.run_timeout:g} s; {text}]\n"
        if ended:
            await self._end(name)
        found = answer(result, event, request)
        found.session_ended = ended
        return found

    async def _interrupted(self, worker: Worker) -> bool:
        """Interrupt a cell; return whether its kernel goes on."""
        worker.send({"op": "interrupt"})
        with contextlib.suppress(TimeoutError, Stopped, Died):
            return (await worker.event(INTERRUPT_S)).name == "done"
        return False

    def _found(self, name: str) -> _Session:
        if name not in self._sessions:
            raise NoSuchSession
        return self._sessions[name]

    async def _end(self, name: str) -> None:
        session = self._sessions.pop(name, None)
        if session is not None:
            await self._runner.pool.end(session.worker)

    async def _end_idle(self) -> None:
        while True:
            await asyncio.sleep(min(MOST_CHECK_S, self._idle_s / 4))
            now = time.monotonic()
            for name, session in list(self._sessions.items()):
                if not session.lock.locked() and now - session.used > session.lease_s:
                    await self._end(name)
