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
from agentloop.errors import TokenLawError, WorkerError
from agentloop.faults import error_from_json
from agentloop.launch.base import Launched, Launcher, Program
from agentloop.runtime.early import ROOT
from agentloop.runtime.variables import child_environment
from agentloop.types import EpisodeStatus, StopReason, Task, Trajectory
from agentloop.worker.episodes import EpisodeUnpacker, unpack
from agentloop.worker.frames import FrameProtocol
from agentloop.worker.limits import RunLimits
from agentloop.worker.messages import (
    Acquire,
    Cancel,
    Finished,
    Forget,
    Granted,
    Message,
    NewImages,
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

STOPPED_S = 20.0
"""A worker that is stopped (SIGSTOP) for this long is replaced."""

SILENT_S = 300.0
"""A worker whose event loop is blocked for this long is replaced: a tool hangs in it."""

END_S = 10.0
"""Time for a worker to close its tools, and again after it was killed."""


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


@dataclass
class _HeldRow:
    """A row that the worker has, for so many episodes."""

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
        serving: whether it takes episodes.
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
        self.serving = False
        self.finished = 0
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

    # -- start and end -----------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the process and wait until it has loaded what the recipe names.

        Raises:
            UserError: it cannot be loaded.
            WorkerError: the process died, or took too long; the end of its log is in the message.
        """
        await self._spawn()
        self.send(self._start)
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._ready
        except TimeoutError:
            await self._kill()
            raise self._start_error(f"was not ready within {self._timeout_s:.0f} s") from None
        except ConnectionError:
            raise self._start_error(f"{await self._reason()} while it started") from None

    async def _spawn(self) -> None:
        loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = loop.create_future()
        self._lost: asyncio.Future[None] = loop.create_future()
        self._unpacker = EpisodeUnpacker()
        self._decode = msgspec.msgpack.Decoder(ToMain, ext_hook=self._unpacker.unmark).decode
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
            self._on_lost()
            self._ready.exception()  # retrieved: the error says more
            raise
        self._connection = await FrameProtocol.connect(self._process.sock, self._on_frame, self._on_lost)
        self._silent_s = 0.0

    def serve(self, message: Serve) -> None:
        """Let it take episodes."""
        self.send(message)
        self.serving = True

    async def ended(self) -> str:
        """Wait until the process ends, or hangs and is killed; return how it ended, as a clause."""
        stopped_s = 0.0
        while not self._lost.done():
            await asyncio.wait([self._lost], timeout=WATCH_S)
            # Counted in looks, so that a run which is stopped as a whole counts nothing.
            stopped_s = stopped_s + WATCH_S if self._process and self._process.stopped else 0.0
            self._silent_s += WATCH_S
            if stopped_s >= STOPPED_S or self._silent_s >= SILENT_S:
                what = "was stopped" if stopped_s else "was blocked by a tool"
                await self._kill()
                return f"{what} for {stopped_s or self._silent_s:.0f} s and was ended"
        return await self._reason()

    def drop_jobs(self) -> list[Job]:
        """Forget a process that has ended; return what ran in it."""
        jobs = [job for job in self.jobs.values() if not job.done.done()]
        self.serving = False
        self.jobs.clear()
        self._rows.clear()
        self._limits.drop(self)
        return jobs

    async def end(self) -> None:
        """Close the connection, at which the process ends; kill it if it does not."""
        self.drop_jobs()
        if self._process is None:
            return
        if self._connection is not None:
            self._connection.close()
        try:
            await asyncio.wait_for(self._process.wait(), END_S)
        except TimeoutError:
            await self._kill()
        self._process = None

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
            code = await asyncio.wait_for(self._process.wait(), END_S)
        except TimeoutError:
            await self._kill()
            return "closed its connection and was ended"
        if code == -signal.SIGKILL:
            return "was killed (SIGKILL; by the kernel if memory ran out)"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def _start_error(self, reason: str) -> WorkerError:
        return WorkerError(
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
        message = self._decode(frame)
        self._silent_s = 0.0
        if isinstance(message, Finished):
            self._on_episode(message)
        elif isinstance(message, Acquire):
            number = message.id
            self._limits.acquire(self, message, lambda: self.send(Granted(number)))
        elif isinstance(message, Release):
            self._limits.release(self, message.id)
        elif isinstance(message, NewImages):
            self._unpacker.add_images(message.key, message.images)
        elif isinstance(message, Status):
            self._lag_max_s = max(self._lag_max_s, message.lag_max_s)
            for culprit in message.culprits:
                self._on_blocked(culprit)
        elif isinstance(message, Ready):
            self._ready.set_result(None)
        elif isinstance(message, Refused):
            self._ready.set_exception(error_from_json(message.error, self._start_error))

    def _on_episode(self, message: Finished) -> None:
        job = self.jobs.pop(message.id, None)
        if job is None:  # cancelled meanwhile
            return
        try:
            trajectories = [unpack(part) for part in message.parts]
            trajectories += [self._unpacker.odd(message.key, text, digests) for text, digests in message.odd]
        except TokenLawError as exc:  # columns that an agent has written itself
            trajectories = [failed_episode(job, f"TokenLawError: {exc}")]
        self.finished += 1
        self._leave(job)
        self._on_finished(job, trajectories)

    def _on_lost(self) -> None:
        self.serving = False
        if not self._lost.done():
            self._lost.set_result(None)
        if not self._ready.done():
            self._ready.set_exception(ConnectionError())


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
