"""Publish through a disk: a folder of safetensors for each version, which the server reads."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from agentloop.wire import UpdateWeightsFromDiskRequest
from trainer.publishing.base import OnFolder, Publisher, Ranks
from trainer.publishing.server_link import ServerLink
from trainer.publishing.weights_folder import prune_versions, version_folder
from trainer.rank_commands import PublishWeights
from trainer.types import Published


class DiskPublisher(Publisher):
    """Writes `v_N` folders and prunes old ones.

    The server may die and be restarted during an update. The restarted one starts from the new
    folder, and `ServerLink.until_served` repeats the update until the server serves the version.
    """

    def __init__(self, ranks: Ranks, server: ServerLink, folder: Path, on_folder: OnFolder) -> None:
        super().__init__(ranks, server, folder, on_folder)
        self._pruning: asyncio.Task[None] | None = None

    @staticmethod
    async def write(ranks: Ranks, folder: Path, version: int) -> Path:
        target = version_folder(folder, version)
        await _write(ranks, target)
        return target

    async def publish(self, version: int) -> float:
        begin = time.perf_counter()
        folder = version_folder(self._folder, version)
        published = await _write(self._ranks, folder)
        self._on_folder(version, folder)

        request = UpdateWeightsFromDiskRequest(
            model_path=str(folder),
            weight_version=str(version),
            checksum=published.checksum,
            running=self._server.running,
        )
        await self._server.until_served(
            version, lambda: self._server.update("/update_weights_from_disk", request.model_dump())
        )

        # In the background: the version is served, and deleting gigabytes takes long.
        await self.close()
        self._pruning = asyncio.create_task(asyncio.to_thread(prune_versions, self._folder, version))
        return time.perf_counter() - begin

    async def close(self) -> None:
        if self._pruning is not None:
            await self._pruning


async def _write(ranks: Ranks, folder: Path) -> Published:
    return await ranks.ask(PublishWeights("disk", {"folder": folder.absolute()}))
