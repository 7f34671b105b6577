"""Publish through shared memory: the server reads while the ranks write, and serves in place."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from pathlib import Path

from agentloop.weights.shared import READER_S, Progress
from agentloop.wire import UpdateWeightsFromTensorRequest
from trainer.publishing.base import Publisher, Ranks
from trainer.publishing.slots import begin_version
from trainer.rank_commands import PublishWeights


class SharedPublisher(Publisher):
    """Writes versions to two slots in turn; the server serves the tensors in place."""

    @staticmethod
    async def write(ranks: Ranks, folder: Path, version: int) -> Path:
        slot = begin_version(folder, version)
        await _fill(ranks, slot)
        return slot

    async def publish(self, version: int) -> float:
        begin = time.perf_counter()
        slot = begin_version(self._folder, version)

        request = UpdateWeightsFromTensorRequest(
            shm_path=str(slot), weight_version=str(version), running=self._server.running
        )

        # At the same time: the server reads what the ranks have just written from the cores'
        # caches.
        await _both(
            self._publish_to(slot, version),
            self._server.until_served(
                version, lambda: self._server.update("/update_weights_from_tensor", request.model_dump())
            ),
        )
        return time.perf_counter() - begin

    async def _publish_to(self, slot: Path, version: int) -> None:
        await _fill(self._ranks, slot, reader_s=READER_S)
        self._on_folder(version, slot)


async def _fill(ranks: Ranks, slot: Path, *, reader_s: float = 0.0) -> None:
    """Write the policy to a slot; if that fails, notify its readers."""
    try:
        await ranks.ask(PublishWeights("shared", {"folder": slot.absolute(), "reader_s": reader_s}))
    except BaseException:
        Progress(slot).fail()
        raise


async def _both(first: Awaitable[None], second: Awaitable[None]) -> None:
    """Await both. When one fails, cancel the other; if both fail, raise the error of `first`."""
    tasks = [asyncio.ensure_future(first), asyncio.ensure_future(second)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task.done():
                task.result()
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
