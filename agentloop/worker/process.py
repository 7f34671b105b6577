"""The process of an agent worker: it runs whole episodes, and sends each when it has ended.

It ends with the main process: when the connection closes or, where a tool blocks it, by the
kernel's parent-death signal (`agentloop.runtime.child`) or by the watch on the connection that it
made (`agentloop.launch.joining`).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import faulthandler
import functools
import io
import itertools
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import NoReturn

from agentloop.agent.base import AgentLoop
from agentloop.agent.code import RunCode, load_renderer, run_client
from agentloop.agent.runner import EpisodeRunner
from agentloop.chat import ChatRenderer
from agentloop.client import rate_limit
from agentloop.client.time_limit import not_counted
from agentloop.config import Recipe, SamplingConfig
from agentloop.errors import WorkerError
from agentloop.faults import error_to_json
from agentloop.launch.joining import connection
from agentloop.runtime.event_loop import run_loops, uncollected
from agentloop.runtime.lag import LoopLagMonitor
from agentloop.trace.spans import Recorder
from agentloop.types import Task
from agentloop.worker.episodes import EpisodePacker
from agentloop.worker.frames import FrameProtocol
from agentloop.worker.messages import (
    Acquire,
    Cancel,
    Failed,
    Forget,
    Granted,
    Message,
    Ready,
    Refused,
    Release,
    Row,
    Run,
    Serve,
    Start,
    Status,
    episode_frames,
    framed,
    worker_decoder,
)
from agentloop.worker.tasks import decode_recipe, decode_task

log = logging.getLogger(__name__)

STATUS_S = 1.0


def main() -> None:
    """Serve the main process at the connection that the command line names."""
    sock = connection(__doc__)
    # A program that a tool starts would keep the connection open when this process has died.
    sock.set_inheritable(False)
    logging.basicConfig(format="%(message)s")
    # A process that is killed takes what it has not written along.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    run_loops(Worker().serve(sock))


@dataclass
class _Row:
    """A row of which episodes run here."""

    task: Task
    packer: EpisodePacker


@dataclass
class _Loaded:
    """What the recipe names, loaded."""

    recipe: Recipe
    code: RunCode
    renderer: ChatRenderer


class Worker:
    """Runs the episodes that the main process sends."""

    def __init__(self) -> None:
        self._decode = worker_decoder().decode
        self._connection: FrameProtocol | None = None
        self._closed = asyncio.Event()
        self._loaded: _Loaded | None = None
        self._loading: asyncio.Task[None] | None = None
        self._status: asyncio.Task[None] | None = None
        self._runner: EpisodeRunner | None = None
        self._rows: dict[int, _Row] = {}
        self._running: dict[int, asyncio.Task[None]] = {}
        self._unwanted: set[int] = set()
        """Episodes that the main process has cancelled."""
        self._limits = _MainLimits(self._send)
        self._stack = AsyncExitStack()
        self._context = contextvars.copy_context()

    async def serve(self, sock: socket.socket) -> None:
        """Run episodes until the connection ends."""
        rate_limit.share(self._limits)
        self._context = contextvars.copy_context()
        self._connection = await FrameProtocol.connect(sock, self._on_frame, self._closed.set)
        await self._closed.wait()
        await self._end()

    async def _end(self) -> None:
        """Cancel what runs; close tools and client."""
        if self._status is not None:
            self._status.cancel()
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        await self._stack.aclose()
        if self._loaded is not None:
            self._loaded.code.close()

    def _send(self, message: Message) -> None:
        assert self._connection is not None
        self._connection.send(framed(message))

    def _on_frame(self, frame: memoryview) -> None:
        message = self._decode(frame)
        if isinstance(message, Run):
            self._begin(message)
        elif isinstance(message, Row):
            self._rows[message.key] = _Row(decode_task(message.task), EpisodePacker(message.key))
        elif isinstance(message, Forget):
            del self._rows[message.key]
        elif isinstance(message, Granted):
            self._limits.granted(message.id)
        elif isinstance(message, Cancel):
            if (task := self._running.get(message.id)) is not None:
                self._unwanted.add(message.id)
                task.cancel()
        elif isinstance(message, Serve):
            self._connect(message)
        elif isinstance(message, Start):
            self._loading = asyncio.create_task(self._load(message), name="load")

    # -- start -------------------------------------------------------------------------------------

    async def _load(self, message: Start) -> None:
        sys.path[:] = message.path
        os.environ.pop("PYTHONPATH", None)
        if message.python_path is not None:
            os.environ["PYTHONPATH"] = message.python_path
        try:
            with uncollected():
                recipe = decode_recipe(message.recipe, message.folder)
                renderer = load_renderer(recipe.model, message.model_path)
                self._loaded = _Loaded(recipe, RunCode.load(recipe), renderer)
        except Exception as exc:  # noqa: BLE001 - the main process must learn of every failure
            self._send(Refused(error_to_json(exc)))
            return
        self._send(Ready())

    def _connect(self, message: Serve) -> None:
        """Send the episodes' requests to a server from now on."""
        loaded = self._loaded
        assert loaded is not None
        rollout = loaded.recipe.rollout
        lag = self._stack.enter_context(LoopLagMonitor(rollout.max_loop_lag_s))
        self._status = asyncio.create_task(self._report(lag), name="status")
        client = run_client(rollout, message.url, token=message.token, max_in_flight=message.max_in_flight)
        self._stack.push_async_callback(client.close)
        self._runner = loaded.code.runner(
            loaded.recipe,
            loaded.renderer,
            client,
            agents=_AgentsByName(loaded.code),
            context_length=message.context_length,
        )

    # -- episodes ----------------------------------------------------------------------------------

    def _begin(self, message: Run) -> None:
        name = f"{message.group_id} sample {message.sample_index}"
        task = asyncio.create_task(self._episode(message), name=name, context=self._context.copy())
        self._running[message.id] = task
        task.add_done_callback(lambda _: self._ended(message.id))

    def _ended(self, number: int) -> None:
        del self._running[number]
        self._unwanted.discard(number)

    async def _episode(self, message: Run) -> None:
        assert self._runner is not None and self._connection is not None
        row = self._rows[message.key]
        try:
            trajectories = await self._runner.run(
                row.task,
                group_id=message.group_id,
                sample_index=message.sample_index,
                sampling=_sampling(message.sampling),
                seed=message.seed,
            )
        except asyncio.CancelledError:
            if message.id not in self._unwanted and not self._closed.is_set():
                error = WorkerError("its task was cancelled, though the run did not ask for it")
                self._send(Failed(message.id, error_to_json(error), fatal=False))
            raise
        except Exception as exc:  # the main process waits for an answer, whatever happens
            log.exception("an episode of row %s could not run", row.task.task_id)
            self._send(Failed(message.id, error_to_json(exc), fatal=True))
            return
        try:
            await self._connection.drain()
            for frame in episode_frames(message.id, message.key, trajectories, row.packer):
                self._connection.send(frame)
        except Exception as exc:  # too long, or a user's object that cannot be written
            log.exception("an episode of row %s cannot be sent", row.task.task_id)
            self._send(Failed(message.id, error_to_json(exc), fatal=False))

    async def _report(self, lag: LoopLagMonitor) -> None:
        while True:
            await asyncio.sleep(STATUS_S)
            culprits = [str(culprit) for culprit in lag.new_culprits() if culprit.is_code]
            self._send(Status(lag.take()["loop/lag_max_s"], culprits))


class _AgentsByName(dict[str, type[AgentLoop]]):
    """The agents that rows name, loaded when the first of them comes."""

    def __init__(self, code: RunCode) -> None:
        super().__init__()
        self._code = code

    def __missing__(self, name: str) -> type[AgentLoop]:
        self[name] = found = self._code.agents.get(name, "a row")
        return found


@functools.lru_cache(64)
def _sampling(text: str) -> SamplingConfig:
    """Return the sampling of an episode; nearly all of a run have the same."""
    return SamplingConfig.model_validate_json(text)


class _MainLimits:
    """The limits that the main process counts for all workers (`rate_limit.SharedLimits`)."""

    def __init__(self, send: Callable[[Message], None]) -> None:
        self._send = send
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[None]] = {}

    @asynccontextmanager
    async def slot(self, name: str, rate: float | None, concurrent: int, caller: Hashable) -> AsyncIterator[None]:
        number = next(self._numbers)
        turn = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._send(Acquire(number, name, rate, concurrent, _caller_name(caller)))
        try:
            with not_counted():
                await turn
            yield
        finally:
            self._waiting.pop(number, None)
            self._send(Release(number))

    def granted(self, number: int) -> None:
        """Let a turn begin, unless it has been cancelled."""
        turn = self._waiting.pop(number, None)
        if turn is not None and not turn.done():
            turn.set_result(None)


def _caller_name(caller: Hashable) -> str:
    """Return a name of an episode that no other worker's has."""
    return caller.trace_id if isinstance(caller, Recorder) else f"{os.getpid()} {id(caller)}"


def exit_now() -> NoReturn:
    """End this process without tearing down the interpreter."""
    logging.shutdown()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)
