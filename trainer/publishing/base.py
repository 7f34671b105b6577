"""A new policy version on its way to the server: handed out by the trainer, served from one decode step to the next."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal, Protocol

from agentloop.config import Recipe
from agentloop.errors import RequestRejected, ServerError, WorkerError
from agentloop.weights.shared import READER_S, Progress
from agentloop.wire import (
    DestroyWeightsUpdateGroupRequest,
    InitWeightsUpdateGroupRequest,
    UpdateWeightsFromDiskRequest,
    UpdateWeightsFromDistributedRequest,
    UpdateWeightsFromTensorRequest,
)
from trainer.publishing.server_link import Conflict, ServerLink
from trainer.publishing.weights_folder import prune_versions

GROUP = "agentloop"
KEPT_VERSIONS = 2
"""On disk: the one that is served, and the one before, which may still be loading somewhere."""


class HandsOut(Protocol):
    """The part of a `WorkerGroup` that publishers need."""

    async def publish(self, folder: Path) -> str: ...

    async def publish_shared(self, folder: Path, *, reader_s: float = 0.0) -> str: ...

    async def publish_broadcast(self, group: str, bucket_bytes: int, folder: Path | None) -> tuple[str, str]: ...

    async def layout(self) -> list[tuple[str, str, list[int]]]: ...

    async def open_group(self, address: str) -> int: ...

    async def join_group(self, group: str, world_size: int, backend: str) -> str: ...

    async def leave_group(self, group: str) -> None: ...


class Publisher(Protocol):
    """One transport."""

    async def write(self, version: int) -> Path:
        """A whole folder with the policy, for a server to start from."""
        ...

    async def publish(self, version: int) -> float:
        """Make the server serve the policy as `version`; returns the seconds that it took.

        Raises:
            ServerError: it could not be made to within the time limit.
            RequestRejected: it refuses the weights.
        """
        ...

    async def close(self) -> None: ...


OnFolder = Callable[[int, Path], None]
"""Told of each version that a server can start from now, with its folder."""


class DiskPublisher:
    """A folder of safetensors for each version; the server reads it.

    The server may die and be started again in the middle: the restarted one already starts from the new folder, and
    `ServerLink.until_served` repeats the update until the server says that it serves the version.
    """

    def __init__(self, workers: HandsOut, server: ServerLink, folder: Path, on_folder: OnFolder) -> None:
        self._workers = workers
        self._server = server
        self._folder = folder
        self._on_folder = on_folder
        self._checksum: str | None = None
        self._pruning: asyncio.Task[None] | None = None

    async def write(self, version: int) -> Path:
        folder = self._folder / f"v_{version}"
        self._checksum = await self._workers.publish(folder)
        return folder

    async def publish(self, version: int) -> float:
        begin = time.perf_counter()
        folder = await self.write(version)
        self._on_folder(version, folder)
        request = UpdateWeightsFromDiskRequest(
            model_path=str(folder),
            weight_version=str(version),
            checksum=self._checksum,
            running=self._server.running,
        )
        await self._server.until_served(
            version, lambda: self._server.update("/update_weights_from_disk", request.model_dump())
        )
        # Nobody waits for it: the version is served, and giving gigabytes back takes long.
        await self.close()
        pruning = asyncio.to_thread(prune_versions, self._folder, version, KEPT_VERSIONS)
        self._pruning = asyncio.create_task(pruning)
        return time.perf_counter() - begin

    async def close(self) -> None:
        if self._pruning is not None:
            await self._pruning


class SharedPublisher:
    """Two folders in shared memory that are written in turn; the server reads while the trainer writes, and serves
    the tensors where they lie."""

    def __init__(self, workers: HandsOut, server: ServerLink, folder: Path, on_folder: OnFolder) -> None:
        self._workers = workers
        self._server = server
        self._slots = [folder / "even", folder / "odd"]
        self._next = 0
        self._on_folder = on_folder

    async def write(self, version: int) -> Path:
        slot = self._begin(version)
        await self._fill(slot, version, reader_s=0.0)
        self._next = 1 - self._next
        return slot

    async def publish(self, version: int) -> float:
        begin = time.perf_counter()
        slot = self._begin(version)
        request = UpdateWeightsFromTensorRequest(
            shm_path=str(slot), weight_version=str(version), running=self._server.running
        )
        await _both(
            self._fill(slot, version, reader_s=READER_S),
            self._server.until_served(
                version, lambda: self._server.update("/update_weights_from_tensor", request.model_dump())
            ),
        )
        # Only now: the version that was served until now must not be written over before.
        self._next = 1 - self._next
        return time.perf_counter() - begin

    async def close(self) -> None:
        """Nothing to let go of."""

    def _begin(self, version: int) -> Path:
        """From here on a reader of the folder waits for `version`."""
        slot = self._slots[self._next]
        slot.mkdir(parents=True, exist_ok=True)
        Progress(slot, create=True).begin(str(version))
        return slot

    async def _fill(self, slot: Path, version: int, *, reader_s: float) -> None:
        try:
            await self._workers.publish_shared(slot, reader_s=reader_s)
        except BaseException:
            Progress(slot).fail()
            raise
        self._on_folder(version, slot)


class DistributedPublisher:
    """Broadcasts from rank 0 in a group of its own. The group is made again when the server's replicas have changed.

    A broadcast is over when it is over: a replica that is started later finds the version in a copy, which is written
    to a folder beside the broadcast.

    Args:
        folder: for the copies; None: the server cannot see a folder of the trainer.
        bucket_bytes: size at which one broadcast ends.
        address: of this machine, as the server reaches it.
        backend: of the group.
    """

    def __init__(
        self,
        workers: HandsOut,
        server: ServerLink,
        folder: Path | None,
        on_folder: OnFolder,
        *,
        bucket_bytes: int,
        address: str,
        backend: Literal["nccl", "gloo"],
    ) -> None:
        self._workers = workers
        self._server = server
        self._slots = [folder / "even", folder / "odd"] if folder is not None else []
        self._next = 0
        self._on_folder = on_folder
        self._address = address
        self._backend = backend
        self._bucket_bytes = bucket_bytes
        self._joined = False

    async def write(self, version: int) -> Path:
        slot = self._begin(version)
        assert slot is not None, "a server that the run starts sees its folders"
        await self._workers.publish_shared(slot)
        self._next = 1 - self._next
        return slot

    async def publish(self, version: int) -> float:
        begin = time.perf_counter()
        layout = await self._workers.layout()
        await self._server.until_served(version, lambda: self._send(version, layout))
        self._next = 1 - self._next
        return time.perf_counter() - begin

    async def close(self) -> None:
        if self._joined:
            await self._leave()

    async def _send(self, version: int, layout: list[tuple[str, str, list[int]]]) -> dict[str, Any]:
        """One attempt.

        Raises:
            ServerError: it did not work; the group is left, the next attempt makes a new one.
        """
        if not self._joined:
            await self._join()
        slot = self._begin(version)
        names, dtypes, shapes = zip(*layout, strict=True)
        request = UpdateWeightsFromDistributedRequest(
            names=list(names),
            dtypes=list(dtypes),
            shapes=list(shapes),
            group_name=GROUP,
            load_format="flattened_bucket",
            bucket_bytes=self._bucket_bytes,
            copy_path=None if slot is None else str(slot),
            weight_version=str(version),
            running=self._server.running,
        )
        updating = asyncio.ensure_future(self._server.update("/update_weights_from_distributed", request.model_dump()))
        sending = asyncio.ensure_future(self._workers.publish_broadcast(GROUP, self._bucket_bytes, slot))
        try:
            await asyncio.wait([updating, sending], return_when=asyncio.FIRST_COMPLETED)
            if updating.done() and updating.exception() is not None:
                # Nobody receives: leaving the group on the other side ends the broadcast on this one.
                await self._server.post("/destroy_weights_update_group", _destroy(), ignore=True)
            checksum, error = await sending
            if slot is not None:
                self._on_folder(version, slot)
            answer = await updating
        except (RequestRejected, Conflict, ServerError) as exc:
            await asyncio.gather(updating, sending, return_exceptions=True)
            await self._leave()
            raise ServerError(f"the broadcast of version {version} failed: {exc}") from exc
        except BaseException:
            updating.cancel()
            raise
        received = str(answer.get("checksum") or "")
        if error or (received.partition(":")[0] == checksum.partition(":")[0] and received != checksum):
            await self._leave()
            raise ServerError(f"the broadcast of version {version} failed: {error or 'it arrived changed'}")
        return answer

    def _begin(self, version: int) -> Path | None:
        if not self._slots:
            return None
        slot = self._slots[self._next]
        slot.mkdir(parents=True, exist_ok=True)
        Progress(slot, create=True).begin(str(version))
        return slot

    async def _join(self) -> None:
        ranks = await self._server.serving_ranks()
        port = await self._workers.open_group(self._address)
        request = InitWeightsUpdateGroupRequest(
            master_address=self._address,
            master_port=port,
            rank_offset=1,
            world_size=1 + ranks,
            group_name=GROUP,
            backend=self._backend,
        )
        asked = asyncio.ensure_future(self._server.post("/init_weights_update_group", request.model_dump()))
        error = await self._workers.join_group(GROUP, 1 + ranks, self._backend)
        try:
            await asked
        except (RequestRejected, Conflict) as exc:
            await self._workers.leave_group(GROUP)
            raise ServerError(f"the weights group did not come about: {exc}") from exc
        if error:
            raise ServerError(f"the weights group did not come about: {error}")
        self._joined = True

    async def _leave(self) -> None:
        self._joined = False
        with contextlib.suppress(ServerError, WorkerError):
            await self._server.post("/destroy_weights_update_group", _destroy(), ignore=True)
            await self._workers.leave_group(GROUP)


def make_publisher(
    recipe: Recipe, workers: HandsOut, server: ServerLink, folder: Path, on_folder: OnFolder
) -> Publisher:
    """The publisher of the transport that the recipe names.

    Args:
        folder: where published weights lie.
    """
    config, rollout = recipe.rollout.publish, recipe.rollout
    match config.transport:
        case "disk":
            return DiskPublisher(workers, server, folder, on_folder)
        case "shm":
            return SharedPublisher(workers, server, folder, on_folder)
    # A server elsewhere sees a folder of this machine only if somebody says so.
    sees = rollout.url is None or config.folder is not None
    on_gpus = recipe.trainer.device == "cuda" and rollout.device.startswith("cuda")
    return DistributedPublisher(
        workers,
        server,
        folder if sees else None,
        on_folder,
        bucket_bytes=config.bucket_mb * 2**20,
        address=config.address or ("127.0.0.1" if rollout.url is None else socket.gethostname()),
        backend="nccl" if on_gpus else "gloo",
    )


def _destroy() -> dict[str, Any]:
    return DestroyWeightsUpdateGroupRequest(group_name=GROUP).model_dump()


async def _both(first: Awaitable[None], second: Awaitable[None]) -> None:
    """Await both; when one fails, the other is not waited for, and the failure of `first` is told rather."""
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
