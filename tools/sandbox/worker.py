"""`Worker`: one sandbox, from its start to its end. It runs one program or one session."""

from __future__ import annotations

import asyncio
import contextlib
import json
import marshal
import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import psutil

from agentloop.errors import ToolError
from tools.sandbox.isolation.bubblewrap import HOME, Bubblewrap
from tools.sandbox.isolation.cgroup import Cgroup, Cgroups
from tools.sandbox.output import Output

START_S = 30.0
"""Seconds in which a sandbox has to be ready."""

END_S = 20.0
"""Seconds in which the kernel has to end a killed sandbox."""

MOST_MESSAGE = 32 * 2**20
"""Bytes of a message from inside."""


class Died(Exception):
    """The sandbox has ended, or does not keep to the protocol."""


class Stopped(Exception):
    """The program went over a limit; the text names it."""


@dataclass(slots=True)
class Event:
    """A message from inside: `ready`, `started`, `compiled`, `done` or `ended`."""

    name: str
    return_code: int | None = None
    files: list[tuple[int, str]] = field(default_factory=list)
    fault: str | None = None


class Worker:
    """A sandbox that waits for a job. Everything in it ends with `end`.

    Attributes:
        init: number of its first process on this machine.
    """

    def __init__(self, launcher: Bubblewrap, cgroups: Cgroups | None, slot: int) -> None:
        self.slot = slot
        self.init = 0
        self._launcher = launcher
        self._cgroups = cgroups
        self._cgroup: Cgroup | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._init_fd = -1
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._folder: str | None = None
        self._stopped: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._outputs: list[Output] = []
        self.stdout: Output
        self.stderr: Output

    async def start(self) -> None:
        """Start the sandbox, and wait until it is ready.

        Raises:
            ToolError: it did not start; the message holds what it wrote.
        """
        ours, theirs = socket.socketpair()
        info_out, info_in = os.pipe()
        out, out_in = os.pipe()
        err, err_in = os.pipe()
        limit = self._launcher.settings.output_bytes
        self.stdout = Output(out, limit, lambda: self.stop("output"))
        self.stderr = Output(err, limit, lambda: self.stop("output"))
        self._outputs = [self.stdout, self.stderr]
        environment: Mapping[str, str] = {}
        folder = HOME
        if not self._launcher.sandboxed:
            folder = self._folder = tempfile.mkdtemp(prefix="agentloop-program-")
            environment = self._launcher.environment(folder)
        self.folder = folder
        try:
            with self._launcher.command(self.slot, info_in) as (command, inherited):
                # In the thread of the event loop: the sandbox dies with the thread that started it.
                self._process = subprocess.Popen(  # noqa: ASYNC220
                    command, stdin=theirs.fileno(), stdout=out_in, stderr=err_in, env=environment, pass_fds=inherited,
                    start_new_session=True, cwd=folder if self._folder else "/",
                )  # fmt: skip
        except OSError as exc:
            ours.close()
            raise ToolError(f"a sandbox could not be started: {exc}", "see the server's log") from exc
        finally:
            theirs.close()
            for fd in (info_in, out_in, err_in):
                os.close(fd)
            if self._process is None:
                os.close(info_out)

        try:
            self._reader, self._writer = await asyncio.open_connection(sock=ours)
            async with asyncio.timeout(START_S):
                event = await self._next()
            if event.name != "ready":
                raise Died
            self.init = self._process.pid
            if self._launcher.sandboxed:
                self.init = int(json.loads(os.read(info_out, 4096))["child-pid"])
            self._init_fd = os.pidfd_open(self.init)
            if self._cgroups is not None:
                self._cgroup = self._cgroups.add(self.init)
        except (Died, TimeoutError, OSError, ValueError, KeyError) as exc:
            said = self.stderr.take().strip()
            await self.end()
            raise ToolError(
                f"a sandbox did not start: {said or repr(exc)}", "see the server's log, and docs/sandbox.md"
            ) from exc
        finally:
            os.close(info_out)
            if self._writer is None:
                ours.close()

    def send(self, job: dict[str, Any]) -> None:
        """Send a job or a cell."""
        assert self._writer is not None
        body = marshal.dumps(job, 2)  # every version of Python reads this one
        self._writer.write(len(body).to_bytes(4, "big") + body)

    async def begin(self, job: dict[str, Any], memory: int) -> None:
        """Send the job of a sandbox, and wait until its first process has read it.

        Args:
            memory: bytes that its processes may take together.

        Raises:
            ToolError: the sandbox has ended before: whatever the reason, not the program's fault.
        """
        try:
            if self._cgroup is not None:
                self._cgroup.limit_memory(memory)
            self.send(job)
            if (await self.event(START_S)).name != "started":
                raise Died
        except (Died, Stopped, TimeoutError, OSError) as exc:
            raise ToolError("a sandbox ended before its program began", "see the server's log") from exc

    def stop(self, reason: str) -> None:
        """Have `event` raise `Stopped`; the first reason counts."""
        if not self._stopped.done():
            self._stopped.set_result(reason)

    @property
    def alive(self) -> bool:
        """Whether a waiting sandbox still waits; the kernel may have ended it."""
        assert self._reader is not None
        ended = select.poll()  # not `select`, which ends at descriptor 1,023
        ended.register(self._init_fd, select.POLLIN)
        return not self._reader.at_eof() and not ended.poll(0)

    @property
    def out_of_memory(self) -> bool:
        """Whether the kernel ended a process for want of memory within the limit."""
        return self._cgroup is not None and self._cgroup.out_of_memory

    async def event(self, timeout_s: float) -> Event:
        """Return the next message from inside.

        Raises:
            TimeoutError: there was none in time.
            Stopped: the program went over a limit meanwhile.
            Died: the sandbox has ended.
        """
        reading = asyncio.create_task(self._next())
        try:
            waited: list[asyncio.Future[Any]] = [reading, self._stopped]
            await asyncio.wait(waited, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if self._stopped.done():
                raise Stopped(self._stopped.result())
            if not reading.done():
                raise TimeoutError
            return reading.result()
        finally:
            if not reading.done():
                reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _next(self) -> Event:
        assert self._reader is not None
        try:
            length = int.from_bytes(await self._reader.readexactly(4), "big")
            if length > MOST_MESSAGE:
                raise Died("a message from inside is too long")
            found = orjson.loads(await self._reader.readexactly(length))
            code = found.get("return_code")
            return Event(
                str(found["event"]),
                None if code is None else int(code),
                [(int(number), str(content)) for number, content in found.get("files", ())],
                found.get("fault"),
            )
        except (asyncio.IncompleteReadError, OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
            raise Died(repr(exc)) from exc

    async def end(self) -> None:
        """Kill everything in the sandbox, and wait until it is gone.

        Raises:
            ToolError: the kernel did not end it in time.
        """
        process, self._process = self._process, None
        try:
            if self._cgroup is not None:
                self._cgroup.kill()
            if process is not None:
                await self._kill(process)
        finally:
            self._release()

    async def _kill(self, process: subprocess.Popen[bytes]) -> None:
        started = time.monotonic()
        if not self._launcher.sandboxed:
            # As far as they can be found: one that has left its parent is not.
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
        if self._init_fd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._init_fd, signal.SIGKILL)
            # Its first process is a zombie only when all others are gone.
            await _ended(self._init_fd)
        else:
            # With bubblewrap's child: before it is the first process of the sandbox, it would wait
            # for its killed parent for ever.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        # bubblewrap ends by itself when it has buried the first process.
        if process.poll() is not None:
            return
        outer = os.pidfd_open(process.pid)
        try:
            if not await _ended(outer, 2.0):
                process.kill()
                await _ended(outer)
        finally:
            os.close(outer)
        if process.poll() is None:
            raise ToolError(
                f"process {process.pid} of a sandbox is still there {time.monotonic() - started:.0f} s after SIGKILL",
                "see whether it hangs in the kernel (state D)",
            )

    def _release(self) -> None:
        if self._init_fd >= 0:
            os.close(self._init_fd)
            self._init_fd = -1
        for output in self._outputs:
            output.close()
        if self._writer is not None:
            self._writer.close()
        if self._cgroup is not None:
            self._cgroup.remove()
        if self._folder is not None:
            from shutil import rmtree

            rmtree(self._folder, ignore_errors=True)


async def _ended(pidfd: int, timeout_s: float = END_S) -> bool:
    """Wait until a process has ended; False: not in time."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await asyncio.wait_for(ended.wait(), timeout_s)
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(pidfd)
    return True


def own_processes(init: int) -> list[Path]:
    """Return the folders in /proc of a sandbox's processes, by its own /proc."""
    base = Path("/proc", str(init), "root", "proc")
    with contextlib.suppress(OSError):
        return [path for path in base.iterdir() if path.name.isdigit()]
    return []
