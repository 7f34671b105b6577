"""`WorkerPool`: the agent workers of a run. Tasks in, trajectories out.

    async with WorkerPool(recipe, model_path, log_dir=..., warn=...) as pool:
        await pool.serve(url, token=..., context_length=..., max_in_flight=...)
        trajectories = await pool.run(task, group_id="g0", sample_index=0, sampling=..., seed=0)

A worker that dies is started again. Its unfinished episodes run elsewhere meanwhile, from their
beginning and with the same seeds, so what a step holds does not depend on it. Episodes that were in
two workers when they died run apart, in a worker of their own; if that dies too, they are divided,
until the one that ends its worker is alone. It fails, and the others go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import sys
from collections import deque
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from agentloop.agent.runner import OnFault
from agentloop.config import Recipe, SamplingConfig
from agentloop.errors import AgentloopError, WorkerError
from agentloop.launch.base import Launcher
from agentloop.launch.local import LocalLauncher
from agentloop.runtime.pacing import Pacer
from agentloop.types import Task, Trajectory
from agentloop.worker.handle import Job, WorkerHandle, WorkerKilled
from agentloop.worker.limits import RunLimits
from agentloop.worker.messages import Serve, Start
from agentloop.worker.suspects import MOST_DEATHS, Suspects
from agentloop.worker.tasks import encode_recipe

AFFINITY = 8
"""Episodes that the worker which has a row may have more than the idlest one: sending the row again
costs less than waiting."""

PACED_FROM = 256
"""Episodes in flight from which on further ones wait for their turn on the event loop: as many as
start in 10 ms."""

LEAVE_POLL_S = 0.1

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.1, 5.0


class WorkerPool:
    """Runs episodes in `cluster.agents.workers` processes. An async context manager.

    Args:
        model_path: local folder of the model.
        log_dir: gets `agent_worker{n}.log`.
        warn: called with each warning.
        launcher: starts the processes; None: as children of this one.

    Attributes:
        restarts: how often a worker was started again.
    """

    def __init__(
        self,
        recipe: Recipe,
        model_path: str,
        *,
        log_dir: Path,
        warn: Callable[[str], None],
        launcher: Launcher | None = None,
    ) -> None:
        self.restarts = 0
        self._launcher = launcher or LocalLauncher()
        self._config = recipe.cluster.agents
        self._start = Start(
            recipe=encode_recipe(recipe),
            folder=str(recipe.folder),
            model_path=model_path,
            path=[entry or str(Path.cwd()) for entry in sys.path],
            python_path=os.environ.get("PYTHONPATH"),
        )
        self._timeout_s = recipe.rollout.start_timeout_s
        self._log_dir = log_dir
        self._warn = warn
        self._on_fault: OnFault = lambda _fault, _row, _episode: None
        self._limits = RunLimits()
        self._ids = itertools.count()
        self._pacer = Pacer()
        self._in_flight = 0
        self._serve: Serve | None = None
        self._starting: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._supervisors: dict[WorkerHandle, asyncio.Task[None]] = {}
        self._waiting: deque[Job] = deque()
        """Episodes that no worker is there for at the moment."""
        self._broken: AgentloopError | None = None
        self._said: set[str] = set()
        self._last_sampling: tuple[SamplingConfig, str] | None = None
        self._workers = [self._worker(number) for number in range(self._config.workers)]
        self._leaving: list[WorkerHandle] = []
        self._suspects = Suspects(self._worker(self._config.workers), self._start_apart, warn)

    def _worker(self, number: int) -> WorkerHandle:
        return WorkerHandle(
            number,
            self._log_dir / f"agent_worker{number}.log",
            self._start,
            launcher=self._launcher,
            timeout_s=self._timeout_s,
            limits=self._limits,
            on_finished=self._finished,
            on_blocked=self._blocked,
        )

    async def __aenter__(self) -> Self:
        """Begin to start the processes; `serve` waits for them."""
        self._log_dir.mkdir(parents=True, exist_ok=True)
        self._starting = asyncio.create_task(self._start_all(), name="start of the agent workers")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes. Episodes that still run are cancelled, and their tools are closed."""
        assert self._starting is not None
        tasks = [self._starting, *self._background]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._broken = self._broken or WorkerError("the agent workers have ended", "run episodes within the block")
        for job in self._unfinished():
            job.done.cancel()
        await asyncio.gather(*(worker.end() for worker in self._all))

    async def _start_all(self) -> None:
        # Each is waited for, so that none is left half started; then the first error is raised.
        results = await asyncio.gather(*map(self._start_worker, self._workers), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _start_worker(self, worker: WorkerHandle) -> None:
        """Start a worker; once more if a signal ends it meanwhile, `max_restarts` times at most."""
        for left in reversed(range(self._config.max_restarts + 1)):
            try:
                return await worker.start()
            except WorkerKilled as exc:
                if not left:
                    raise
                self._warn(f"{_without_log(exc)}; it is started again")
            self.restarts += 1
            await asyncio.sleep(FIRST_BACKOFF_S)

    async def serve(
        self,
        url: str,
        *,
        token: str | None,
        context_length: int,
        max_in_flight: int,
        on_fault: OnFault = lambda _fault, _row, _episode: None,
    ) -> None:
        """Let the workers run episodes on the rollout server at `url`. Call it once.

        Args:
            token: the server's bearer token.
            max_in_flight: episodes that may be in flight at once.
            on_fault: called with each exception of user code, as by `EpisodeRunner`.

        Raises:
            UserError: a worker cannot load what the recipe names.
            WorkerError: a worker died while it started; the end of its log is in the message.
        """
        assert self._starting is not None
        await self._starting
        self._on_fault = on_fault
        self._serve = Serve(url, token, context_length, max_in_flight)
        for worker in self._workers:
            worker.serve(self._serve)
            name = f"supervisor of agent worker {worker.number}"
            self._supervisors[worker] = self._keep(self._supervise(worker), name)
        self._keep(self._run_suspects(), "the worker of episodes that run apart")

    # -- episodes ----------------------------------------------------------------------------------

    async def run(
        self, task: Task, *, group_id: str, sample_index: int, sampling: SamplingConfig, seed: int | None
    ) -> list[Trajectory]:
        """Run one episode; return its trajectories, the main one last. A failure is a status.

        Raises:
            WorkerError: the workers die whenever they are started.
            DataError: the row holds what cannot be sent.
        """
        self._in_flight += 1
        try:
            if self._in_flight > PACED_FROM:
                await self._pacer.turn()
            return await self._run(task, group_id, sample_index, sampling, seed)
        finally:
            self._in_flight -= 1

    async def _run(
        self, task: Task, group_id: str, sample_index: int, sampling: SamplingConfig, seed: int | None
    ) -> list[Trajectory]:
        done: asyncio.Future[list[Trajectory]] = asyncio.get_running_loop().create_future()
        job = Job(next(self._ids), task, group_id, sample_index, self._json(sampling), seed, done)
        self._assign(job)
        try:
            return await done
        finally:
            if done.cancelled():
                for worker in self._all:
                    worker.cancel(job)

    def _json(self, sampling: SamplingConfig) -> str:
        """Return the JSON of a sampling; nearly all episodes have the same object."""
        if self._last_sampling is None or self._last_sampling[0] is not sampling:
            self._last_sampling = sampling, sampling.model_dump_json()
        return self._last_sampling[1]

    def processes(self) -> list[int]:
        """Return the process ids of the workers that take episodes."""
        return [worker.pid for worker in self._workers if worker.serving and worker.pid is not None]

    def states(self) -> list[dict[str, Any]]:
        """Return number, state, process and running episodes of each worker."""
        return [
            {
                "number": worker.number,
                "state": "leaving" if worker in self._leaving else "serving" if worker.serving else "starting",
                "pid": worker.pid,
                "in_flight": len(worker.jobs),
            }
            for worker in sorted((*self._workers, *self._leaving), key=lambda worker: worker.number)
        ]

    async def scale(self, workers: int) -> None:
        """Have this many workers from now on; at least 1. Call it after `serve`.

        New ones take episodes once they have started. Of those that leave, the newest go first, and
        each ends when its episodes have ended.
        """
        taken = {worker.number for worker in self._all}
        unused = (number for number in itertools.count() if number not in taken)
        for number in itertools.islice(unused, max(0, workers - len(self._workers))):
            worker = self._worker(number)
            self._workers.append(worker)
            self._supervisors[worker] = self._keep(self._join(worker), f"supervisor of agent worker {number}")

        self._workers.sort(key=lambda worker: (not worker.serving, worker.number))
        leaving = self._workers[workers:]
        del self._workers[workers:]
        self._leaving += leaving
        for worker in leaving:
            self._keep(self._leave(worker), f"end of agent worker {worker.number}")

    async def _join(self, worker: WorkerHandle) -> None:
        """Start a further worker; one that dies at once is left to `_supervise`."""
        with contextlib.suppress(WorkerError):
            await worker.start()
            self._admit(worker)
        await self._supervise(worker)

    async def _leave(self, worker: WorkerHandle) -> None:
        """End a worker when its episodes have ended."""
        worker.withdraw()
        while worker.jobs:  # noqa: ASYNC110  # the last of them may end in many ways
            await asyncio.sleep(LEAVE_POLL_S)
        supervisor = self._supervisors.pop(worker)  # it may be starting the worker again
        supervisor.cancel()
        await asyncio.gather(supervisor, return_exceptions=True)
        await worker.end()
        self._leaving.remove(worker)

    @property
    def _all(self) -> list[WorkerHandle]:
        return [*self._workers, *self._leaving, self._suspects.worker]

    def take_metrics(self) -> dict[str, float]:
        """Return `workers/lag_max_s` since the last call, and `workers/restarts` so far."""
        lag = max(worker.take_lag() for worker in self._workers)
        return {"workers/lag_max_s": lag, "workers/restarts": float(self.restarts)}

    def _assign(self, job: Job) -> None:
        """Give an episode to a worker: to that which has its row, unless others have less to do."""
        if self._broken is not None:
            job.done.set_exception(self._broken)
            return
        ready = [worker for worker in self._workers if worker.serving]
        if not ready:
            self._waiting.append(job)
            return
        chosen = min(ready, key=lambda worker: len(worker.jobs))
        holder = next((worker for worker in ready if worker.holds(job.task)), chosen)
        if len(holder.jobs) <= len(chosen.jobs) + AFFINITY:
            chosen = holder
        try:
            chosen.give(job)
        except Exception as exc:  # noqa: BLE001  # raised where the episode is awaited, whoever assigns it
            job.done.set_exception(exc)

    def _finished(self, job: Job, trajectories: list[Trajectory]) -> None:
        """Pass on an episode, and what its user code raised."""
        main = trajectories[-1]
        for fault in main.faults:
            self._on_fault(fault, main.task_id, f"{main.group_id}/{main.sample_index}")
        if not job.done.done():
            job.done.set_result(trajectories)

    def _blocked(self, culprit: str) -> None:
        if culprit not in self._said:
            self._said.add(culprit)
            self._warn(f"agent worker: {culprit}; its episodes wait for it (docs/agents.md, Where blocking code runs)")

    # -- deaths ------------------------------------------------------------------------------------

    async def _supervise(self, worker: WorkerHandle) -> None:
        """Start a worker again whenever it dies."""
        in_a_row, finished = 0, 0
        reason: str | None = None
        while True:
            reason = reason or await worker.ended()
            if self._broken is not None:
                return
            if worker not in self._workers:  # it has left
                self._reassign(worker, reason, again=False)
                return
            in_a_row = 1 if worker.finished > finished else in_a_row + 1
            finished = worker.finished
            self._reassign(worker, reason)
            if in_a_row > self._config.max_restarts:
                self._break(
                    WorkerError(
                        f"agent worker {worker.number} died {in_a_row} times in a row, without having finished an "
                        f"episode in between. Last it {reason}. The end of {worker.log}:\n{worker.log_tail()}",
                        "the last lines above name the cause; --resume continues the run",
                    )
                )
                return
            await asyncio.sleep(min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (in_a_row - 1)))
            self.restarts += 1
            try:
                await worker.start()
            except WorkerError as exc:
                reason = f"could not be started: {_without_log(exc)}"
                continue
            except AgentloopError as exc:  # a file that the recipe names was changed meanwhile
                self._break(exc)
                return
            reason = None
            self._admit(worker)

    def _admit(self, worker: WorkerHandle) -> None:
        """Let a worker that has started take episodes, and give it those that wait."""
        assert self._serve is not None
        worker.serve(self._serve)
        waiting, self._waiting = self._waiting, deque()
        for job in waiting:
            if not job.done.done():
                self._assign(job)

    def _reassign(self, worker: WorkerHandle, reason: str, *, again: bool = True) -> None:
        """Give the unfinished episodes of a worker that has died to others.

        Args:
            again: whether it is started again.
        """
        jobs = worker.drop_jobs()
        which = "episode starts" if len(jobs) == 1 else "episodes start"
        parts = [f"agent worker {worker.number} {reason}"]
        parts += ["it is started again"] if again else []
        parts += [f"its {len(jobs)} unfinished {which} again in others"] if jobs else []
        if again or jobs:
            self._warn("; ".join(parts))
        suspects = []
        for job in jobs:
            job.deaths += 1
            if job.deaths < MOST_DEATHS:
                self._assign(job)
            else:
                suspects.append(job)
        self._suspects.add(suspects)

    async def _run_suspects(self) -> None:
        try:
            await self._suspects.run()
        except AgentloopError as exc:
            self._break(exc)

    async def _start_apart(self, worker: WorkerHandle) -> None:
        assert self._serve is not None
        await self._start_worker(worker)
        worker.serve(self._serve)

    def _break(self, error: AgentloopError) -> None:
        """Let every episode that has not ended raise an error."""
        self._broken = self._broken or error
        for job in self._unfinished():
            job.done.set_exception(error)

    def _unfinished(self) -> list[Job]:
        """Take away and return what runs or waits."""
        jobs = [job for worker in self._all for job in worker.drop_jobs()]
        jobs += [*self._suspects.take(), *self._waiting]
        self._waiting.clear()
        return [job for job in jobs if not job.done.done()]

    def _keep(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run work beside the episodes, until the end."""
        task = asyncio.create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        task.add_done_callback(self._retrieve)
        return task

    def _retrieve(self, task: asyncio.Task[None]) -> None:
        """Fail the episodes if what looks after them has failed: nothing else would end them."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self._break(WorkerError(f"{task.get_name()} failed: {error!r}", "this is a fault of agentloop: report it"))


def _without_log(error: WorkerError) -> str:
    """Return an error of a start without the end of the log."""
    return error.message.partition(". The end of")[0]
