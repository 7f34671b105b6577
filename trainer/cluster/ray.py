"""Start the processes of a run on the nodes of a Ray cluster."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from agentloop.errors import ServerStartError, WorkerError
from agentloop.launch.base import Launched, Program
from agentloop.launch.joining import KEY_VARIABLE, LEASE_VARIABLE, connection_words
from agentloop.launch.listener import Expected, Listener, connected
from agentloop.runtime.child import Child, log_tail
from agentloop.runtime.early import ROOT
from trainer.cluster import supervisor
from trainer.cluster.placement import Placement
from trainer.cluster.session import Session, answer

BEGIN_S = 120.0
"""Time for an actor to be there: a busy node starts a worker in seconds."""

RETRY_S = 1.0

CONNECT_S = 120.0
"""Time for a process to connect: it imports its modules before, from a shared disk perhaps."""

KILL_S = 5.0
"""Time for a process to end after SIGKILL; then its actor is killed, which ends it too."""


class NotPlaced(WorkerError):
    """Ray has not put an actor into its place."""


class RayLauncher:
    """Starts each process beside an actor, in the place that is reserved for it.

    Args:
        listener: where the processes connect.
        variables: `cluster.env`.
    """

    local = False

    def __init__(
        self, session: Session, placement: Placement, listener: Listener, variables: Mapping[str, str]
    ) -> None:
        self.one_machine = session.one_machine
        self._placement = placement
        self._listener = listener
        self._variables = dict(variables)
        self._running: set[RayProcess] = set()

    @property
    def host(self) -> str | None:
        """The address of the rollout server's node; None if other machines need not reach it."""
        return None if self.one_machine else self._placement.address("server", 0)

    async def start(self, program: Program) -> Launched:
        """Start a process, and wait until it has connected."""
        expected = self._listener.expect(program.name)
        words = connection_words(self._address, expected.identity)
        process = await self._begin(program, [*program.arguments, *words], _key(expected))
        sock = await connected(expected, process.wait(), CONNECT_S)
        if sock is None:
            process.kill()
            raise WorkerError(
                f"{program.name} did not connect from {process.address}. Last lines of {program.log}:\n"
                + process.log_tail(),
                "the last lines above name the cause; nodes must reach this machine on all ports",
            )
        process.sock = sock
        return process

    async def start_server(self, title: str, program: Program) -> Child:
        """Start a server, which holds a lease on this process."""
        expected = self._listener.expect(program.name)
        words = connection_words(self._address, expected.identity)
        variables = {**_key(expected), LEASE_VARIABLE: " ".join(words)}
        try:
            process = await self._begin(program, program.arguments, variables)
        except WorkerError as exc:
            raise ServerStartError(exc.message, exc.hint) from exc
        return RemoteServer(title, process, program.log, expected)

    async def close(self) -> None:
        """End what still runs."""
        await asyncio.gather(*(process.end() for process in list(self._running)))

    @property
    def _address(self) -> str:
        return f"{self._listener.host}:{self._listener.port}"

    async def _begin(self, program: Program, arguments: Sequence[str], variables: Mapping[str, str]) -> RayProcess:
        place = self._placement.place(program.role, program.number)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + BEGIN_S
        while True:
            actor = supervise(place.group, place.index, place.gpus)
            process = RayProcess(program, actor, self._running.discard)
            try:
                await process.begin(
                    [sys.executable, "-P", "-m", program.module, *arguments],
                    {**program.variables, **self._variables, "PYTHONPATH": ROOT, **variables},
                )
            except NotPlaced:
                # Its node is lost: Ray notices that within a quarter of a minute, and moves the
                # place to another.
                process.drop()
                if loop.time() > deadline:
                    raise
                await asyncio.sleep(RETRY_S)
                continue
            except BaseException:
                process.drop()
                raise
            self._running.add(process)
            return process


@functools.cache
def actor_class() -> Any:
    """Return the supervisor as an actor class, which workers get by value."""
    import ray
    from ray import cloudpickle

    module: ModuleType = supervisor
    cloudpickle.register_pickle_by_value(module)
    return ray.remote(supervisor.Supervisor)


def supervise(group: Any, index: int, gpus: float) -> Any:
    """Return a new actor in a reserved place."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    return actor_class().options(num_cpus=0, num_gpus=gpus, max_restarts=0, scheduling_strategy=strategy).remote()


class RayProcess:
    """A process on a node, seen through its actor.

    Attributes:
        address: of its node.
        code: its exit code; None while it runs.
        stopped: whether it is stopped by a signal.
    """

    sock: socket.socket

    def __init__(self, program: Program, actor: Any, on_end: Callable[[RayProcess], None]) -> None:
        self.pid = 0
        self.address = ""
        self.code: int | None = None
        self.stopped = False
        self._name = program.name
        self._log = program.log
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        self._actor = actor
        self._on_end = on_end
        self._ended = asyncio.Event()
        self._following: asyncio.Task[None] | None = None

    async def begin(self, command: Sequence[str], variables: Mapping[str, str]) -> None:
        """Start it.

        Raises:
            WorkerError: Ray does not place the actor, or the node cannot start the command.
        """
        what = f"{self._name} could not be started"
        try:
            place = await answer(self._actor.place.remote(), BEGIN_S, what)
        except WorkerError as exc:
            raise NotPlaced(exc.message, exc.hint) from exc
        self.address = place["address"]
        # In a call and not in the actor's constructor, whose arguments Ray keeps in its database:
        # the variables hold the key.
        pid = await answer(
            self._actor.begin.remote(list(command), dict(variables), place["gpus"], str(Path.cwd())), BEGIN_S, what
        )
        if isinstance(pid, str):
            raise WorkerError(
                f"{what} on node {self.address}: {pid}", "install the environment at the same path on every node"
            )
        self.pid = pid
        self._following = asyncio.create_task(self._follow(), name=f"output of {self._name}")

    async def wait(self) -> int:
        await self._ended.wait()
        assert self.code is not None
        return self.code

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        asyncio.get_running_loop().call_later(KILL_S, self._kill_actor)

    def signal(self, number: int) -> None:
        """Send a signal to it and all that it has started."""
        if self.code is None:
            self._actor.signal.remote(int(number))

    async def end(self) -> None:
        """Kill it, and wait for its end with a bound."""
        self.kill()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), KILL_S)
        self.drop()

    def drop(self) -> None:
        """Give the actor back."""
        if self._following is not None:
            self._following.cancel()
        self._finish(-signal.SIGKILL)

    def log_tail(self) -> str:
        return log_tail(self._log, start=self._log_start)

    async def _follow(self) -> None:
        """Write what it prints to its log, until its end."""
        from ray.exceptions import RayError

        code: int | None = None
        with self._log.open("ab", buffering=0) as log:
            while code is None:
                try:
                    output, code, self.stopped = await self._actor.follow.remote()
                    log.write(output)
                except RayError as exc:
                    log.write(f"Ray: {str(exc).strip().splitlines()[0]}\n".encode())
                    code = -signal.SIGKILL  # it is tied to its actor
        self._finish(code)

    def _finish(self, code: int) -> None:
        if self.code is None:
            self.code = code
            self._kill_actor()
            self._ended.set()
            self._on_end(self)

    def _kill_actor(self) -> None:
        import ray

        with contextlib.suppress(Exception):
            ray.kill(self._actor)


class _Poll:
    """A process as `Child` sees one."""

    def __init__(self, process: RayProcess) -> None:
        self._process = process
        self.pid = process.pid

    def poll(self) -> int | None:
        return self._process.code

    def kill(self) -> None:
        self._process.kill()


class RemoteServer(Child):
    """A server on a node. It holds a lease: it ends when this process closes the connection."""

    def __init__(self, title: str, process: RayProcess, log: Path, expected: Expected) -> None:
        super().__init__(title, [], {}, log, early=_Poll(process), log_start=process._log_start)
        self._remote = process
        expected.connection.add_done_callback(self._leased)
        self._lease: socket.socket | None = None

    @property
    def stopped(self) -> bool:
        return self._remote.stopped

    async def ended(self) -> int:
        code = await super().ended()
        self._end_lease()  # Ray may take a node for dead on which the server still runs
        return code

    async def kill(self) -> None:
        """Kill the server. One whose node does not answer ends by itself, as its lease does."""
        await super().kill()
        self._remote.drop()
        self._end_lease()

    def _end_lease(self) -> None:
        if self._lease is not None:
            self._lease.close()
            self._lease = None

    def _leased(self, connection: asyncio.Future[socket.socket]) -> None:
        if not connection.cancelled():
            self._lease = connection.result()

    def _signal(self, number: signal.Signals) -> None:
        self._remote.signal(number)


def node_actor(node: str) -> Any:
    """Return a new actor on a node, outside of what is reserved."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return actor_class().options(num_cpus=0, max_restarts=0, scheduling_strategy=strategy).remote()


def _key(expected: Expected) -> dict[str, str]:
    return {KEY_VARIABLE: expected.key.hex()}
