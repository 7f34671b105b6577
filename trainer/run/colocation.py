"""Engine and trainer on the same GPUs, in turns: `rollout.colocated`.

Each needs the memory for itself. A step has four stages, and what is on the GPUs in each is:

    sample      engine: weights, KV cache
    train       trainer: policy, reference, gradients, optimizer
    publish     trainer: policy; engine: weights
    sample      engine: weights, KV cache

The engine is woken up in two stages, by tags: in `publish` its KV cache, which is the largest part,
is not there yet. The trainer's state waits in host memory.
"""

from __future__ import annotations

from trainer.publishing.base import Publisher
from trainer.publishing.server_link import ServerLink
from trainer.rank_commands import MoveIn, MoveOut
from trainer.workers.group import WorkerGroup


class Colocation:
    """Hands the GPUs from the engine to the trainer and back.

    The trainer moves out when it has started, before the engine starts: `MoveOut(policy=True)`.
    """

    def __init__(self, workers: WorkerGroup, server: ServerLink) -> None:
        self._workers = workers
        self._server = server

    async def to_trainer(self) -> None:
        """Take the GPUs from the engine. No request may be in flight.

        Raises:
            ServerError: the engine cannot release its memory.
            WorkerError: a rank has no room.
        """
        await self._server.release_memory()
        await self._workers.ask(MoveIn())

    async def publish(self, publisher: Publisher, version: int) -> None:
        """Publish the policy, and give the GPUs back to the engine.

        Raises:
            ServerError: the version could not be published.
            RequestRejected: the server refuses the weights.
        """
        await self._workers.ask(MoveOut(policy=False))
        await self._server.resume_memory("weights")
        await publisher.publish(version)

        await self._workers.ask(MoveOut(policy=True))
        await self._server.resume_memory("kv_cache")
        await self._server.continue_generation()
