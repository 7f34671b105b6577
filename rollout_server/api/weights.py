"""The routes through which a trainer changes the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI

from agentloop.weights.layout import CODES
from agentloop.wire import (
    DestroyWeightsUpdateGroupRequest,
    InitWeightsUpdateGroupRequest,
    UpdateRequest,
    UpdateWeightsFromDiskRequest,
    UpdateWeightsFromDistributedRequest,
    UpdateWeightsFromTensorRequest,
)
from rollout_server.api.admin import add_admin
from rollout_server.engines.base import (
    BroadcastWeights,
    FolderWeights,
    SharedWeights,
    UpdateGroup,
    WeightsError,
    WeightsSource,
)
from rollout_server.errors import HttpError, bad_request
from rollout_server.router.router import Router


def add_weights(app: FastAPI, router: Router, roots: tuple[Path, ...]) -> None:
    """Add them.

    Args:
        roots: folders under which weights may be read.
    """

    async def take(request: UpdateRequest, source: WeightsSource, field: str) -> dict[str, Any]:
        version = request.weight_version
        if version is None:
            if isinstance(source, BroadcastWeights):
                raise bad_request("weight_version: a broadcast has to name its version", "weight_version")
            version = source.folder.name
        if request.abort_all_requests:
            await router.abort()
        try:
            receipt = await router.update_weights(source, version, request.running)
        except WeightsError as exc:
            raise bad_request(str(exc), field) from exc
        message = f"serving version {receipt.version}"
        return {"message": message, "weight_version": receipt.version, "checksum": receipt.checksum}

    async def update(request: UpdateWeightsFromDiskRequest) -> dict[str, Any]:
        """Serve the safetensors of a folder as a new version, from the next step on. A folder that does not hold this
        model's weights, whole, changes nothing. The prefixes that old weights computed are always forgotten,
        whatever `flush_cache` says."""
        folder = _allowed_folder(request.model_path, roots, "model_path")
        if request.load_format not in (None, "auto", "safetensors"):
            raise bad_request("only safetensors are loaded", "load_format")
        return await take(request, FolderWeights(folder, request.checksum), "model_path")

    async def update_shared(request: UpdateWeightsFromTensorRequest) -> dict[str, Any]:
        """Serve the file of a folder in shared memory, without a copy where dtype and device allow. The folder's file
        may not be changed before the version after it is served."""
        folder = _allowed_folder(request.shm_path, roots, "shm_path")
        return await take(request, SharedWeights(folder, request.checksum), "shm_path")

    async def update_distributed(request: UpdateWeightsFromDistributedRequest) -> dict[str, Any]:
        """Serve what rank 0 of a group broadcasts now, tensor by tensor or bucket by bucket, in the order of
        `names`."""
        if not len(request.names) == len(request.dtypes) == len(request.shapes):
            raise bad_request("names, dtypes and shapes have to be of one length", "names")
        for dtype in request.dtypes:
            if dtype not in CODES:
                raise bad_request(f"{dtype} is none of {', '.join(CODES)}", "dtypes")
        copy = request.copy_path and _allowed_folder(request.copy_path, roots, "copy_path")
        bucket = request.bucket_bytes or 2**62 if request.load_format == "flattened_bucket" else None
        source = BroadcastWeights(
            tuple(request.names),
            tuple(request.dtypes),
            tuple(tuple(shape) for shape in request.shapes),
            request.group_name,
            bucket,
            copy or None,
            request.checksum,
        )
        return await take(request, source, "names")

    async def join(request: InitWeightsUpdateGroupRequest) -> str:
        """Meet a trainer in a group for `/update_weights_from_distributed`. 409: the group is made for fewer ranks than
        the serving replicas have."""
        group = UpdateGroup(
            request.group_name,
            request.master_address,
            request.master_port,
            request.rank_offset,
            request.world_size,
            request.backend,
        )
        try:
            await router.join_weights_group(group)
        except WeightsError as exc:
            raise bad_request(str(exc), "master_address") from exc
        return f"in group {request.group_name}"

    async def leave(request: DestroyWeightsUpdateGroupRequest) -> str:
        """Leave a group."""
        if not await router.leave_weights_group(request.group_name):
            raise bad_request(f"there is no group {request.group_name!r}", "group_name")
        return f"left group {request.group_name}"

    add_admin(app, "/update_weights_from_disk", UpdateWeightsFromDiskRequest, update)
    add_admin(app, "/update_weights_from_tensor", UpdateWeightsFromTensorRequest, update_shared)
    add_admin(app, "/update_weights_from_distributed", UpdateWeightsFromDistributedRequest, update_distributed)
    add_admin(app, "/init_weights_update_group", InitWeightsUpdateGroupRequest, join)
    add_admin(app, "/destroy_weights_update_group", DestroyWeightsUpdateGroupRequest, leave)


def _allowed_folder(path: str, roots: tuple[Path, ...], field: str) -> Path:
    """The folder, if it is under a root; links are followed before it is judged."""
    try:
        folder = Path(path).resolve()
    except (OSError, ValueError, RuntimeError) as exc:
        raise bad_request(f"{field} is no path: {exc}", field) from exc
    if not any(folder.is_relative_to(root) for root in roots):
        raise HttpError(403, "forbidden", f"{path} is not under a --weights-root of this server", field)
    if not folder.is_dir():
        raise bad_request(f"there is no folder {path}", field)
    return folder
