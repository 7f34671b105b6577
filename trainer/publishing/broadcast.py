"""Publish by broadcast: rank 0 sends the tensors to all engines in a weight update group."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from pathlib import Path
from typing import Any, Literal, Self

from agentloop.config import Recipe
from agentloop.errors import RequestRejected, ServerError, WorkerError
from agentloop.wire import (
    DestroyWeightsUpdateGroupRequest,
    InitWeightsUpdateGroupRequest,
    UpdateWeightsFromDistributedRequest,
)
from trainer.publishing.base import OnFolder, Publisher, Ranks
from trainer.publishing.server_link import Conflict, ServerLink
from trainer.publishing.slots import begin_version
from trainer.rank_commands import JoinGroup, Layout, LeaveGroup, OpenGroup, PublishedLayout, PublishWeights

GROUP = "agentloop"


class BroadcastPublisher(Publisher):
    """Broadcasts from rank 0 in a group, which is rebuilt when the server's replicas change.

    Only replicas that are in the group receive a broadcast. One that starts later reads the version
    from a copy, which the ranks write to a slot while they broadcast.

    Args:
        copies: whether the server can read copies from `folder`; False: there are none.
        bucket_bytes: size at which one broadcast ends.
        address: of this machine, as the server reaches it.
        backend: of the group.
    """

    def __init__(
        self,
        ranks: Ranks,
        server: ServerLink,
        folder: Path,
        on_folder: OnFolder,
        *,
        copies: bool = True,
        bucket_bytes: int,
        address: str,
        backend: Literal["nccl", "gloo"],
    ) -> None:
        super().__init__(ranks, server, folder, on_folder)
        self._copies = copies
        self._bucket_bytes = bucket_bytes
        self._address = address
        self._backend = backend
        self._joined = False

    @classmethod
    def from_recipe(cls, recipe: Recipe, ranks: Ranks, server: ServerLink, folder: Path, on_folder: OnFolder) -> Self:
        rollout, config = recipe.rollout, recipe.rollout.publish
        on_gpus = recipe.trainer.device == "cuda" and rollout.device.startswith("cuda")
        return cls(
            ranks,
            server,
            folder,
            on_folder,
            # A server elsewhere can read a folder of this machine only if the recipe names one that
            # it can.
            copies=rollout.url is None or config.folder is not None,
            bucket_bytes=config.bucket_mb * 2**20,
            address=config.address or ("127.0.0.1" if rollout.url is None else socket.gethostname()),
            backend="nccl" if on_gpus else "gloo",
        )

    @staticmethod
    async def write(ranks: Ranks, folder: Path, version: int) -> Path:
        slot = begin_version(folder, version)
        await ranks.ask(PublishWeights("shared", {"folder": slot.absolute()}))
        return slot

    async def publish(self, version: int) -> float:
        begin = time.perf_counter()
        layout = await self._ranks.ask(Layout())
        await self._server.until_served(version, lambda: self._send(version, layout))
        return time.perf_counter() - begin

    async def close(self) -> None:
        if self._joined:
            await self._leave()

    async def _send(self, version: int, layout: PublishedLayout) -> dict[str, Any]:
        """Broadcast once, and return the server's answer.

        Raises:
            ServerError: the attempt failed. The group is closed; the next attempt makes a new one.
        """
        if not self._joined:
            await self._join()
        slot = begin_version(self._folder, version) if self._copies else None

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
        options = {
            "group": GROUP,
            "bucket_bytes": self._bucket_bytes,
            "folder": None if slot is None else slot.absolute(),
        }

        updating = asyncio.ensure_future(self._server.update("/update_weights_from_distributed", request.model_dump()))
        sending = asyncio.ensure_future(self._ranks.ask(PublishWeights("broadcast", options)))

        try:
            await asyncio.wait([updating, sending], return_when=asyncio.FIRST_COMPLETED)
            if updating.done() and updating.exception() is not None:
                # Nothing receives. When the other side leaves the group, the broadcast on this side
                # ends.
                await self._server.post("/destroy_weights_update_group", _destroy(), ignore=True)
            published = await sending
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

        error = published.error
        if not error and _differ(published.checksum, str(answer.get("checksum") or "")):
            error = f"checksum mismatch after the broadcast: sent {published.checksum}, got {answer['checksum']}"
        if error:
            await self._leave()
            raise ServerError(f"the broadcast of version {version} failed: {error}")
        return answer

    async def _join(self) -> None:
        """Make the group: the trainer's rank 0, and all ranks of the replicas that serve now."""
        ranks = await self._server.serving_ranks()
        port = await self._ranks.ask(OpenGroup(self._address))
        request = InitWeightsUpdateGroupRequest(
            master_address=self._address,
            master_port=port,
            rank_offset=1,
            world_size=1 + ranks,
            group_name=GROUP,
            backend=self._backend,
        )

        # Both sides join at the same time: each waits for the other.
        joining = asyncio.ensure_future(self._server.post("/init_weights_update_group", request.model_dump()))
        error = await self._ranks.ask(JoinGroup(GROUP, 1 + ranks, self._backend))

        try:
            await joining
        except (RequestRejected, Conflict) as exc:
            await self._ranks.ask(LeaveGroup(GROUP))
            raise ServerError(f"the weight update group could not be formed: {exc}") from exc
        if error:
            raise ServerError(f"the weight update group could not be formed: {error}")
        self._joined = True

    async def _leave(self) -> None:
        self._joined = False
        with contextlib.suppress(ServerError, WorkerError):
            await self._server.post("/destroy_weights_update_group", _destroy(), ignore=True)
            await self._ranks.ask(LeaveGroup(GROUP))


def _differ(sent: str, received: str) -> bool:
    """Whether two checksums differ. False if they are of different algorithms."""
    return received.partition(":")[0] == sent.partition(":")[0] and received != sent


def _destroy() -> dict[str, Any]:
    return DestroyWeightsUpdateGroupRequest(group_name=GROUP).model_dump()
