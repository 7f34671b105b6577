"""The processes of a run: trainer ranks, rollout server, and the connections between them.

`start_processes` is an async context manager. It starts ranks and server concurrently, at the
version of a checkpoint if there is one. At the end, whatever happens, it closes runner, publisher,
connection, ranks, server and published weights.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from agentloop.client.open_files import shortage
from agentloop.config import Recipe
from agentloop.errors import DiskError, InfrastructureError, UserError
from agentloop.launch.base import Launcher
from agentloop.weights.layout import tensor_bytes
from agentloop.worker.pool import WorkerPool
from trainer.cluster.opening import open_launcher
from trainer.console.console import Console
from trainer.publishing.base import Publisher
from trainer.publishing.server_link import ServerLink
from trainer.publishing.server_process import ServerProcess
from trainer.publishing.transports import make_publisher, write_version
from trainer.publishing.weights_folder import WeightsFolder
from trainer.rank_commands import MoveOut
from trainer.rollouts.error_log import ErrorLog
from trainer.rollouts.producer import RunsEpisodes
from trainer.run.colocation import Colocation
from trainer.run.evaluation import max_in_flight
from trainer.run.preflight import RunInputs
from trainer.run.rundir import CheckpointState, RunDir
from trainer.workers.group import WorkerGroup

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The running processes.

    Attributes:
        workers: the trainer's ranks.
        server: the rollout server; None if the recipe names one that runs elsewhere.
        link: admin connection to the server.
        publisher: sends new versions from the ranks to the server.
        runner: runs episodes on the server.
        agent_workers: the processes in which it does; None: in this one.
        colocation: hands the GPUs over; None: engine and trainer have their own.
    """

    workers: WorkerGroup
    server: ServerProcess | None
    link: ServerLink
    publisher: Publisher
    runner: RunsEpisodes
    agent_workers: WorkerPool | None = None
    colocation: Colocation | None = None

    async def guard(self, work: Awaitable[T]) -> T:
        """Await `work`, but stop if the rollout server cannot be restarted.

        Raises:
            ServerStartError: the server died and could not be restarted.
        """
        task = asyncio.ensure_future(work)
        died = self.server.died if self.server is not None else None
        if died is None:
            return await task

        waiting: list[asyncio.Future[Any]] = [task, died]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await _cancel(task)
            raise
        if died.done() and not task.done():
            await _cancel(task)
            died.result()
        return await task


@contextlib.asynccontextmanager
async def start_processes(
    recipe: Recipe, inputs: RunInputs, run_dir: RunDir, console: Console, checkpoint: CheckpointState | None
) -> AsyncIterator[Processes]:
    """Start trainer and rollout server, and end them when the block ends.

    Args:
        checkpoint: the run continues from it; None: from the recipe's model.

    Raises:
        InfrastructureError: a process did not start; the end of its log is in the message.
        ConfigError: the folder of published weights belongs to another user or run.
        DiskError: at the end, the last weights could not be kept in the run directory.
    """
    version = checkpoint.version if checkpoint is not None else 0
    async with AsyncExitStack() as stack:
        launcher = await stack.enter_async_context(open_launcher(recipe, console))
        shared = recipe.rollout.url is None and launcher.one_machine
        weights = WeightsFolder.create(run_dir.weights, recipe.rollout.publish.folder, local=shared)
        server = _make_server(recipe, inputs, run_dir, console, weights, launcher)
        served = _ServedWeights(server)
        # Pushed first, so that it runs last: processes that read the weights have ended by then.
        stack.push(lambda kind, exc, trace: served.keep(weights, failed=exc is not None))
        if server is not None:
            stack.push_async_callback(server.stop)

        agent_workers = await stack.enter_async_context(inputs.workers(run_dir.logs, console.warn, launcher))
        url: str | None = None
        colocated = recipe.rollout.colocated
        # Version 0 is the model's own folder, from which the server starts without the ranks; with
        # adapters of another run it is the merged model, which the ranks write first.
        if checkpoint is None and inputs.adapters is None and server is not None and not colocated:
            with console.phase("start trainer and rollout server"):
                starting = _start_workers(recipe, inputs, run_dir, launcher)
                workers, url = await _start_both(starting, server.start(0, None), stack)
        else:
            with console.phase("start trainer"):
                workers = await _start_workers(recipe, inputs, run_dir, launcher)
                stack.push_async_callback(workers.close)
        if checkpoint is not None:
            with console.phase(f"load checkpoint of step {checkpoint.step}"):
                await workers.load(checkpoint.path / "trainer")

        await _check_room(weights, workers, run_dir, console)
        if url is None and server is not None:
            with console.phase("start rollout server"):
                folder = await write_version(recipe, workers, weights.path, version)
                if colocated:
                    # Before the engine starts: it takes what is free on the GPUs.
                    await workers.ask(MoveOut(policy=True))
                # A run that was killed after its last step publishes nothing more: these are the
                # weights it keeps.
                served.note(version, folder)
                url = await server.start(version, folder)
        if server is not None:
            stack.push_async_callback(_end_both, workers, server)
        url = url or str(recipe.rollout.url)
        token = recipe.rollout.token if server is None else server.token

        link = ServerLink(
            url,
            running=recipe.rollout.publish.running,
            token=recipe.rollout.admin_token or token,
            timeout_s=recipe.rollout.start_timeout_s,
        )
        stack.push_async_callback(link.close)
        publisher = make_publisher(_with_address(recipe, workers), workers, link, weights.path, served.note)
        stack.push_async_callback(publisher.close)
        if server is None:
            await publisher.publish(version)
            if colocated:
                await workers.ask(MoveOut(policy=True))

        if warning := shortage(max_in_flight(recipe)):
            console.warn(warning)
        errors = ErrorLog(run_dir.logs / "errors.jsonl", console.warn)
        most = max_in_flight(recipe)
        colocation = Colocation(workers, link) if colocated else None
        async with inputs.runner(
            url, token=token, max_in_flight=most, on_fault=errors, workers=agent_workers
        ) as runner:
            yield Processes(workers, server, link, publisher, runner, agent_workers, colocation)


class _ServedWeights:
    """The served version and its folder, for a server restart and for the end of the run."""

    def __init__(self, server: ServerProcess | None) -> None:
        self._server = server
        self._version = 0
        self._folder: Path | None = None

    def note(self, version: int, folder: Path) -> None:
        """Record a version that a server can start from now."""
        self._version, self._folder = version, folder
        if self._server is not None:
            self._server.serves(version, folder)

    def keep(self, weights: WeightsFolder, *, failed: bool) -> None:
        """Keep the last version in the run directory and remove the rest.

        Args:
            failed: the run ends with an error, which a full disk here must not replace.

        Raises:
            DiskError: the version could not be copied.
        """
        try:
            weights.close(self._folder, f"v_{self._version}")
        except DiskError:
            if not failed:
                raise


def _make_server(
    recipe: Recipe, inputs: RunInputs, run_dir: RunDir, console: Console, weights: WeightsFolder, launcher: Launcher
) -> ServerProcess | None:
    if recipe.rollout.url is not None:
        return None
    return ServerProcess(
        model_path=inputs.model_path,
        model=recipe.model,
        rollout=recipe.rollout,
        seed=recipe.seed_for("rollout"),
        log_file=run_dir.logs / "server.log",
        weights_roots=[run_dir.weights, weights.path],
        on_restart=console.warn,
        # Each agent worker keeps connections of its own.
        connections=max_in_flight(recipe) * max(1, recipe.cluster.agents.workers),
        launcher=launcher,
    )


def _start_workers(recipe: Recipe, inputs: RunInputs, run_dir: RunDir, launcher: Launcher) -> Awaitable[WorkerGroup]:
    trainer = recipe.trainer
    # Of the policy; the learning-rate schedule is stretched over them.
    optimizer_steps = max(1, inputs.total_steps - trainer.critic_warmup) * trainer.algorithm.minibatches
    return WorkerGroup.start(
        model_path=inputs.model_path,
        config=trainer,
        dtype=recipe.model.dtype,
        total_steps=optimizer_steps,
        seed=recipe.seed_for("trainer"),
        log_dir=run_dir.logs,
        reference=trainer.algorithm.kl_coef > 0,
        trust_remote_code=recipe.model.trust_remote_code,
        adapters=inputs.adapters,
        launcher=launcher,
    )


def _with_address(recipe: Recipe, workers: WorkerGroup) -> Recipe:
    """Return the recipe with the address of rank 0, if that may be on another machine than this
    process: the server joins the group of broadcasts there."""
    publish = recipe.rollout.publish
    if publish.address is not None or not workers.address:
        return recipe
    publish = publish.model_copy(update={"address": workers.address})
    return recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"publish": publish})})


async def _start_both(
    start_workers: Awaitable[WorkerGroup], start_server: Awaitable[str], stack: AsyncExitStack
) -> tuple[WorkerGroup, str]:
    """Start ranks and server concurrently; return the ranks and the server's URL.

    If one fails, the other is awaited too, so that the stack can end it. A user error (the model
    cannot be loaded) is the cause of whatever else failed; then come infrastructure errors.
    """
    # The server first: it has more to do until it serves.
    url, workers = results = await asyncio.gather(start_server, start_workers, return_exceptions=True)
    if not isinstance(workers, BaseException):
        stack.push_async_callback(workers.close)

    errors = [result for result in results if isinstance(result, BaseException)]
    for error in sorted(errors, key=_rank_of_error):
        raise error
    assert not isinstance(workers, BaseException) and not isinstance(url, BaseException)
    return workers, url


async def _end_both(workers: WorkerGroup, server: ServerProcess) -> None:
    """End ranks and server concurrently. Errors are left to the calls that end each again."""
    await asyncio.gather(workers.close(), server.stop(), return_exceptions=True)


def _rank_of_error(error: BaseException) -> int:
    return 0 if isinstance(error, UserError) else 1 if isinstance(error, InfrastructureError) else 2


async def _check_room(weights: WeightsFolder, workers: WorkerGroup, run_dir: RunDir, console: Console) -> None:
    """Publish in the run directory if shared memory has no room for the model."""
    layout = await workers.layout()
    size = sum(tensor_bytes(dtype, shape) for _, dtype, shape in layout)
    if weights.passes and not weights.fits(size):
        console.warn(f"{weights.path} has no room for the weights; they are published in {run_dir.weights} instead")
        weights.fall_back()


async def _cancel(task: asyncio.Future[T]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
