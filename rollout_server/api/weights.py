"""The routes through which a trainer publishes weights."""

from __future__ import annotations

import os
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
    UpdateWeightVersionRequest,
    WeightUpdateRequest,
)
from rollout_server.api.admin import add_admin
from rollout_server.engines.base import BroadcastWeights, FolderWeights, SharedWeights, UpdateGroup, WeightsSource
from rollout_server.errors import Forbidden, RequestError, WeightsError
from rollout_server.router.router import Router

ONE_BUCKET = 2**62
"""Size of a flattened bucket that takes all tensors."""


def add_weights(app: FastAPI, router: Router, roots: tuple[Path, ...]) -> None:
    """Add the routes.

    Args:
        roots: folders under which weights may be read.
    """

    async def publish(request: UpdateRequest, source: WeightsSource, field: str) -> dict[str, Any]:
        if request.weight_version is None and isinstance(source, SharedWeights):
            raise RequestError("weight_version: name the version that is written to the shared file", "weight_version")
        version = request.weight_version or router.weights.version  # as SGLang: unnamed weights keep the name
        if request.abort_all_requests:
            await router.abort()

        try:
            confirmed = await router.weights.update(source, version, request.running)
        except WeightsError as exc:
            raise RequestError(str(exc), field) from exc
        message = f"serving version {confirmed.version}"
        return {"message": message, "weight_version": confirmed.version, "checksum": confirmed.checksum}

    async def update(request: UpdateWeightsFromDiskRequest) -> dict[str, Any]:
        """Serve the safetensors of a folder as a new version, from the next step on. A folder that
        does not hold all of this model's weights changes nothing. Prefixes computed with old
        weights are always dropped, regardless of `flush_cache`."""
        folder = _allowed_folder(request.model_path, roots, "model_path")
        if request.load_format not in (None, "auto", "safetensors"):
            raise RequestError("only safetensors are loaded", "load_format")
        return await publish(request, FolderWeights(folder, request.checksum), "model_path")

    async def update_shared(request: UpdateWeightsFromTensorRequest) -> dict[str, Any]:
        """Serve the file of a folder in shared memory, without a copy where dtype and device allow.
        The file must not be changed until the next version is served."""
        folder = _allowed_folder(request.shm_path, roots, "shm_path")
        return await publish(request, SharedWeights(folder, request.checksum), "shm_path")

    async def update_distributed(request: UpdateWeightsFromDistributedRequest) -> dict[str, Any]:
        """Serve the tensors that rank 0 of an update group broadcasts now, one by one or in
        buckets, in the order of `names`."""
        return await publish(request, _broadcast(request, roots), "names")

    async def join(request: InitWeightsUpdateGroupRequest) -> str:
        """Join an update group of a trainer, for `/update_weights_from_distributed`. 409: the group
        has fewer ranks than the serving replicas need."""
        group = UpdateGroup(
            request.group_name,
            request.master_address,
            request.master_port,
            request.rank_offset,
            request.world_size,
            request.backend,
        )
        try:
            await router.weights.join_group(group)
        except WeightsError as exc:
            raise RequestError(str(exc), "master_address") from exc
        return f"in group {request.group_name}"

    async def leave(request: DestroyWeightsUpdateGroupRequest) -> str:
        """Leave an update group."""
        if not await router.weights.leave_group(request.group_name):
            raise RequestError(f"there is no update group {request.group_name!r}", "group_name")
        return f"left group {request.group_name}"

    async def begin(_: WeightUpdateRequest) -> str:
        """Do nothing, for SGLang's clients: here every update is complete in itself."""
        return "an update is one request: /update_weights_from_disk, _from_tensor or _from_distributed"

    async def rename(request: UpdateWeightVersionRequest) -> dict[str, Any]:
        """Give the served weights another name, without loading any. By default the requests in
        flight are aborted first, as in SGLang."""
        if request.abort_all_requests:
            await router.abort()
        await router.weights.rename(request.new_version)
        return {
            "message": f"the weights are version {request.new_version} now",
            "weight_version": request.new_version,
            "new_version": request.new_version,
        }

    add_admin(app, "/begin_weight_update", WeightUpdateRequest, begin)
    add_admin(app, "/end_weight_update", WeightUpdateRequest, begin)
    add_admin(app, "/update_weight_version", UpdateWeightVersionRequest, rename)
    add_admin(app, "/update_weights_from_disk", UpdateWeightsFromDiskRequest, update)
    add_admin(app, "/update_weights_from_tensor", UpdateWeightsFromTensorRequest, update_shared)
    add_admin(app, "/update_weights_from_distributed", UpdateWeightsFromDistributedRequest, update_distributed)
    add_admin(app, "/init_weights_update_group", InitWeightsUpdateGroupRequest, join)
    add_admin(app, "/destroy_weights_update_group", DestroyWeightsUpdateGroupRequest, leave)


def _broadcast(request: UpdateWeightsFromDistributedRequest, roots: tuple[Path, ...]) -> BroadcastWeights:
    if not len(request.names) == len(request.dtypes) == len(request.shapes):
        raise RequestError("names, dtypes and shapes must have the same length", "names")
    for dtype in request.dtypes:
        if dtype not in CODES:
            raise RequestError(f"dtype {dtype} is not supported: use one of {', '.join(CODES)}", "dtypes")

    flattened = request.load_format == "flattened_bucket"
    return BroadcastWeights(
        tuple(request.names),
        tuple(request.dtypes),
        tuple(tuple(shape) for shape in request.shapes),
        request.group_name,
        bucket_bytes=(request.bucket_bytes or ONE_BUCKET) if flattened else None,
        copy=_allowed_folder(request.copy_path, roots, "copy_path") if request.copy_path else None,
        checksum=request.checksum,
    )


def _allowed_folder(path: str, roots: tuple[Path, ...], field: str) -> Path:
    """Return the folder if it and its files are under a root, with links resolved."""
    try:
        folder = Path(path).resolve()
    except (OSError, ValueError, RuntimeError) as exc:
        raise RequestError(f"{field} is not a path: {exc}", field) from exc
    if not _is_under(folder, roots):
        raise Forbidden(f"{path} is not under a --weights-root of this server", field)
    if not folder.is_dir():
        raise RequestError(f"the folder {path} does not exist", field)

    for file in folder.iterdir():
        if file.is_symlink() and not file.is_dir() and not _is_under(Path(os.path.realpath(file)), roots):
            raise Forbidden(
                f"{path}/{file.name} links to a file outside the --weights-roots of this server: copy the file, or "
                "add its folder as a --weights-root",
                field,
            )
    return folder


def _is_under(path: Path, roots: tuple[Path, ...]) -> bool:
    return any(path.is_relative_to(root) for root in roots)
