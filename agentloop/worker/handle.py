"""One agent worker, seen from the main process: start it, give it episodes, notice its end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from agentloop.columns import Logprobs, LossMask, TokenIds, Versions
from agentloop.errors import WorkerError
from agentloop.faults import error_from_json
from agentloop.launch.base import Launched, Launcher, Program
from agentloop.runtime.child import StoppedTime
from agentloop.runtime.early import ROOT
from agentloop.runtime.variables import child_environment
from agentloop.types import EpisodeStatus, StopReason, Task, Trajectory
from agentloop.worker.episodes import EpisodeUnpacker
from agentloop.worker.frames import FrameProtocol
from agentloop.worker.limits import RunLimits
from agentloop.worker.messages import (
    Acquire,
    Cancel,
    Failed,
    Finished,
    Forget,
    Granted,
    Message,
    NewImage,
    Ready,
    Refused,
    Release,
    Row,
    Run,
    Serve,
    Start,
    Status,
    ToMain,
    framed,
)
from agentloop.worker.tasks import encode_task

WATCH_S = 1.0

SILENT_S = 300.0
"""A worker whose event loop is blocked for this long is replaced: a tool hangs in it."""

SHOW_S = 0.5
"""Time for a worker that hangs to write where it does."""

CLOSED_S = 3.0
"""Time for a worker that has closed its connection to end; with closed files it does not."""

END_S = 10.0
"""Time for a worker to close its tools, and again after it was killed."""


class WorkerKilled(WorkerError):
    """A signal ended a worker while it started: a further start may succeed."""


@dataclass(eq=False)
class Job:
    """An episode to run.

    Attributes:
        sampling: JSON of a `SamplingConfig`.
        done: its trajectories.
        deaths: workers that died while it ran in them.
    """

    id: int
    task: Task
    group_id: str
    sample_index: int
    sampling: str
    seed: int | None
    done: asyncio.Future[list[Trajectory]]
    deaths: int = 0

    @property
    def place(self) -> str:
        """The episode in words, for messages."""
        return f"row {self.task.task_id}, group {self.group_id}, sample {self.sample_index}"


@dataclass
class _HeldRow:
    """A row that the worker has.

    Attributes:
        key: names it in messages.
        episodes: those of the row that run in the worker.
    """

    key: int
    task: Task
    episodes: int = 0


class WorkerHandle:
    """One worker process and its connection.

    Args:
        number: of the worker.
        log: takes what it prints; appended to.
        start: what it loads.
        launcher: starts the process.
        timeout_s: time limit of its start.
        limits: of tools, counted for all workers.
        on_finished: called with each episode that ends.
        on_blocked: called with what blocked the worker's event loop.

    Attributes:
        jobs: what runs in it, by id.
        finished: episodes that have ended in it, over all its starts.
    """

    def __init__(
        self,
        number: int,
        log: Path,
        start: Start,
        *,
        launcher: Launcher,
        timeout_s: float,
        limits: RunLimits,
        on_finished: Callable[[Job, list[Trajectory]], None],
        on_blocked: Callable[[str], None],
    ) -> None:
        self.number = number
        self.log = log
        self.jobs: dict[int, Job] = {}
        self.finished = 0
        self._serves = self._served = False
        self._start = start
        self._launcher = launcher
        self._timeout_s = timeout_s
        self._limits = limits
        self._on_finished = on_finished
        self._on_blocked = on_blocked
        self._process: Launched | None = None
        self._connection: FrameProtocol | None = None
        self._keys = itertools.count()
        self._rows: dict[int, _HeldRow] = {}  # by id of the task
        self._lag_max_s = 0.0
        self._silent_s = 0.0

    @property
    def pid(self) -> int | None:
        """The id of the process; None before its first start."""
        return None if self._process is None else self._process.pid

    @property
    def serving(self) -> bool:
        """Whether it takes episodes."""
        return self._serves and not self._lost.done()

    # -- start and end -----------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the process and wait until it has loaded what the recipe names.

        Raises:
            UserError: it cannot be loaded.
            WorkerKilled: a signal ended it, or stopped it.
            WorkerError: it ended, or took too long; the end of its log is in the message. Or the
                system has no room for another process.
        """
        try:
            await self._spawn()
        except OSError as exc:
            raise WorkerError(
                f"agent worker {self.number} cannot be started: {exc}",
                "free memory, disk space or file descriptors (ulimit -n), or lower cluster.agents.workers",
            ) from exc
        self.send(self._start)
        try:
            await self._until_ready()
        except ConnectionError:
            reason = await self._reason()
            killed = self._exited.done() and self._exited.result() < 0
            raise self._start_error(f"{reason} while it started", WorkerKilled if killed else WorkerError) from None

    async def _until_ready(self) -> None:
        """Wait until the process has loaded what the recipe names. Raises as `start`."""
        assert self._process is not None
        loop = asyncio.get_running_loop()
        deadline, stopped = loop.time() + self._timeout_s, StoppedTime()
        while not self._ready.done():
            await asyncio.wait([self._ready], timeout=WATCH_S)
            if stopped.look(self._process.stopped, WATCH_S):
                await self._kill()
                raise self._start_error(f"was stopped for {stopped.seconds:.0f} s while it started", WorkerKilled)
            if not self._ready.done() and loop.time() > deadline:
                await self._kill()
                raise self._start_error(f"was not ready within {self._timeout_s:.0f} s")
        await self._ready

    async def _spawn(self) -> None:
        loop = asyncio.get_running_loop()
        self._served = False
        self._ready = ready = loop.create_future()
        self._lost = lost = loop.create_future()
        self._unpacker = EpisodeUnpacker()
        program = Program(
            name=f"agent_worker{self.number}",
            role="agent",
            number=self.number,
            module="agentloop.worker",
            arguments=(),
            # The worker must import the package that started it, wherever that was imported from.
            environment=child_environment(1) | {"PYTHONPATH": ROOT},
            variables=child_environment(1, base={}),
            log=self.log,
        )
        self._process = None
        try:
            self._process = await self._launcher.start(program)
        except WorkerError:
            _end_futures(ready, lost)
            ready.exception()  # retrieved: the error says more
            raise
        # Either ends first: a process that a tool has forked may keep the connection open.
        self._exited = asyncio.ensure_future(self._process.wait())
        self._exited.add_done_callback(lambda _: _end_futures(ready, lost))
        sock = self._process.sock
        self._connection = await FrameProtocol.connect(sock, self._on_frame, lambda: _end_futures(ready, lost))
        self._silent_s = 0.0

    def serve(self, message: Serve) -> None:
        """Let it take episodes."""
        self.send(message)
        self._serves = self._served = True

    def withdraw(self) -> None:
        """Give it no further episodes."""
        self._serves = False

    async def ended(self) -> str:
        """Wait until the process ends, or hangs and is killed; return how it ended, as a clause."""
        stopped = StoppedTime()
        while not self._lost.done():
            await asyncio.wait([self._lost], timeout=WATCH_S)
            too_long = stopped.look(self._process is not None and self._process.stopped, WATCH_S)
            self._silent_s += WATCH_S
            if too_long or self._silent_s >= SILENT_S:
                what = "was stopped" if stopped.seconds else "was blocked by a tool"
                await self._show_stacks()
                await self._kill()
                return f"{what} for {stopped.seconds or self._silent_s:.0f} s and was ended"
        return await self._reason()

    def drop_jobs(self) -> list[Job]:
        """End the connection to a process; return what ran in it."""
        jobs = [job for job in self.jobs.values() if not job.done.done()]
        if self._connection is not None:
            self._connection.abort()
        self._serves = False
        self.jobs.clear()
        self._rows.clear()
        self._limits.drop(self)
        return jobs

    async def end(self) -> None:
        """End the connection, at which the process ends; kill it if it does not."""
        self.drop_jobs()
        if self._process is None:
            return
        if not self._served:  # it is importing, and looks at nothing else
            await self._kill()
        try:
            await asyncio.wait_for(self._process.wait(), END_S)
        except TimeoutError:
            await self._kill()
        self._process = None

    async def _show_stacks(self) -> None:
        """Let the process write into its log where each of its threads is."""
        assert self._process is not None
        if not self._launcher.local:
            return  # it is on another machine
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGUSR1)
        await asyncio.sleep(SHOW_S)

    async def _kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        with contextlib.suppress(TimeoutError):  # stuck in the kernel, and left behind
            await asyncio.wait_for(self._process.wait(), END_S)

    async def _reason(self) -> str:
        """Return how the process ended, as a clause."""
        if self._process is None:
            return "could not be started"
        try:
            code = await asyncio.wait_for(self._process.wait(), CLOSED_S)
        except TimeoutError:
            await self._kill()
            return "closed its connection and was ended"
        if code == -signal.SIGKILL:
            return "was killed (SIGKILL; by the kernel if memory ran out)"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def _start_error(self, reason: str, kind: type[WorkerError] = WorkerError) -> WorkerError:
        return kind(
            f"agent worker {self.number} {reason}. The end of {self.log}:\n{self.log_tail()}",
            "the last lines above name the cause",
        )

    def log_tail(self) -> str:
        """Return the last lines that the process has printed, indented."""
        return "" if self._process is None else self._process.log_tail()

    # -- episodes ----------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Send a message; one to a process that has ended is lost."""
        assert self._connection is not None
        self._connection.send(framed(message))

    def holds(self, task: Task) -> bool:
        """Whether the worker has this row."""
        return id(task) in self._rows

    def give(self, job: Job) -> None:
        """Let the worker run an episode.

        Raises:
            DataError: the row holds what cannot be sent.
        """
        row = self._rows.get(id(job.task))
        if row is None:
            packed = encode_task(job.task)
            row = self._rows[id(job.task)] = _HeldRow(next(self._keys), job.task)
            self._unpacker.expect(row.key)
            self.send(Row(row.key, packed))
        row.episodes += 1
        self.jobs[job.id] = job
        self.send(Run(job.id, row.key, job.group_id, job.sample_index, job.sampling, job.seed))

    def cancel(self, job: Job) -> None:
        """Cancel an episode, if it runs here."""
        if self.jobs.pop(job.id, None) is not None:
            self.send(Cancel(job.id))
            self._leave(job)

    def _leave(self, job: Job) -> None:
        """Let the worker forget the row of an episode that has ended, if it was the last."""
        row = self._rows[id(job.task)]
        row.episodes -= 1
        if not row.episodes:
            del self._rows[id(job.task)]
            self._unpacker.forget(row.key)
            self.send(Forget(row.key))

    def take_lag(self) -> float:
        """Return how late the worker's event loop was at most since the last call, in seconds."""
        lag, self._lag_max_s = self._lag_max_s, 0.0
        return lag

    # -- what arrives ------------------------------------------------------------------------------

    def _on_frame(self, frame: memoryview) -> None:
        message = _decode(frame)
        self._silent_s = 0.0
        if isinstance(message, Finished | Failed):
            self._on_episode(message)
        elif isinstance(message, Acquire):
            number = message.id
            self._limits.acquire(self, message, lambda: self.send(Granted(number)))
        elif isinstance(message, Release):
            self._limits.release(self, message.id)
        elif isinstance(message, NewImage):
            self._unpacker.add_image(message.key, message.image)
        elif isinstance(message, Status):
            self._lag_max_s = max(self._lag_max_s, message.lag_max_s)
            for culprit in message.culprits:
                self._on_blocked(culprit)
        elif isinstance(message, Ready):
            self._ready.set_result(None)
        elif isinstance(message, Refused):
            self._ready.set_exception(error_from_json(message.error, self._start_error))

    def _on_episode(self, message: Finished | Failed) -> None:
        job = self.jobs.pop(message.id, None)
        if job is None:  # cancelled meanwhile
            return
        self.finished += 1
        try:
            if isinstance(message, Finished):
                found = self._unpacker.episode(message.key, message.parts, message.odd)
            else:
                error = error_from_json(message.error, lambda text: WorkerError(f"{job.place}: {text}"))
                if message.fatal:
                    job.done.set_exception(error)
                    return
                found = [failed_episode(job, f"its trajectories cannot be sent to the main process: {error.message}")]
        except Exception as exc:  # noqa: BLE001  # user code may have put anything into any field
            found = [failed_episode(job, f"what its agent has left cannot be read: {exc}")]
        finally:
            self._leave(job)
        self._on_finished(job, found)


_decode = msgspec.msgpack.Decoder(ToMain).decode


def _end_futures(ready: asyncio.Future[None], lost: asyncio.Future[None]) -> None:
    """Note that a process or its connection has ended."""
    if not lost.done():
        lost.set_result(None)
    if not ready.done():
        ready.set_exception(ConnectionError())


def failed_episode(job: Job, error: str) -> Trajectory:
    """Return the trajectory of an episode of which nothing is left."""
    task = job.task
    return Trajectory(
        token_ids=TokenIds(),
        loss_mask=LossMask(),
        logprobs=Logprobs(),
        versions=Versions(),
        prompt_length=0,
        stop_reason=StopReason.ERROR,
        status=EpisodeStatus.FAILED,
        error=error,
        agent_name=task.agent_name,
        task_id=task.task_id,
        group_id=job.group_id,
        sample_index=job.sample_index,
        data_source=task.data_source,
        messages=list(task.prompt),
        trace_id=os.urandom(16).hex(),
    )
