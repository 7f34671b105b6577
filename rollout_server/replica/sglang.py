"""A bare SGLang server as a replica: where its API differs from ours.

It runs in a separate environment, because it pins other versions of torch and transformers than the
trainer. Nothing of it is imported here.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

from agentloop.weights.layout import buckets, tensor_bytes
from agentloop.weights.shared import STALLED_S, StalledError, await_shared
from rollout_server.engines.base import (
    BroadcastWeights,
    EngineInfo,
    EngineStats,
    Generation,
    GenerationResult,
    PauseMode,
    RunningMode,
    SharedWeights,
    WeightsConfirmation,
    WeightsSource,
)
from rollout_server.errors import Conflict, EngineError, RequestError, WeightsError
from rollout_server.replica.http import HttpReplica

UNNAMED_VERSION = "default"
"""SGLang's name for the version of weights that were loaded without one."""


FIXED_IMAGE_NAMES = frozenset({"qwen3_vl", "qwen3_vl_moe"})
"""`model_type` of models with which SGLang 0.5.23 ends with an IndexError when a request names its
images."""

BAN = -1000.0
"""Bias of tokens that are never sampled: beyond all logits, and finite in 16 bits."""


class SglangReplica(HttpReplica):
    """A bare SGLang server.

    Args:
        on_gpu: whether it runs on a GPU; on a CPU it cannot release memory.
        overlap: whether its overlap scheduler is on. It samples one token ahead of its
            bookkeeping. An in_place update labels that token with the new version, and nothing in
            the answer tells which requests have one. `retract` drains it first.
        tensor_parallel: GPUs of the server, each of which is one rank of an update group.
        image_cache: whether it may keep embeddings of images beyond an update of the weights. Those
            that we start do not.
        others: as `HttpReplica`.
    """

    def __init__(
        self,
        name: str,
        url: str,
        info: EngineInfo,
        *,
        on_gpu: bool,
        overlap: bool,
        tensor_parallel: int,
        image_cache: bool = False,
        version: str = "0",
        token: str | None = None,
        stream_tokens: int = 0,
        incremental: bool = True,
        admin_timeout_s: float = 20.0,
        update_timeout_s: float = 600.0,
    ) -> None:
        super().__init__(
            name,
            url,
            info,
            version=known_version(version),
            token=token,
            stream_tokens=stream_tokens,
            incremental=incremental,
            admin_timeout_s=admin_timeout_s,
            update_timeout_s=update_timeout_s,
        )

        self._on_gpu = on_gpu
        self._overlap = overlap
        self._tensor_parallel = tensor_parallel
        self._renames_images = image_cache and info.model_type not in FIXED_IMAGE_NAMES
        self._paused: PauseMode | None = None
        self._updates = 0
        self._changes = 0  # beginnings and ends of updates: odd while one runs

    async def is_up(self) -> bool:
        """Return whether it has started; its own start includes a generation."""
        try:
            await self.get("/model_info")
            await self.get("/health")
        except EngineError:
            return False
        return True

    async def generate(self, generation: Generation) -> GenerationResult:
        if generation.sampling.min_new_tokens:
            raise RequestError(
                "SGLang without a tokenizer does not support min_new_tokens: leave it out or use the torch engine",
                "sampling_params.min_new_tokens",
            )
        return await super().generate(generation)

    def _request(self, generation: Generation) -> dict[str, Any]:
        """As ours, in SGLang's form for models with images.

        - SGLang expands one placeholder for each image; the answer tells the length it came to.
        - A bias bans placeholders. It also takes their probability out of the logprobs.
        - A cache of images outlives updates of the weights: hashes that change with the version are
          not found there. Running requests keep theirs, so that only SGLANG_VLM_CACHE_SIZE_MB=0
          makes those exact.
        """
        request = super()._request(generation)
        placeholders = self.info.placeholders
        if placeholders is None:
            return request

        request["input_ids"] = placeholders.collapse(generation.input_ids)
        banned = {str(token): BAN for token in placeholders.never_sampled}
        request["sampling_params"]["logit_bias"] = request["sampling_params"].get("logit_bias", {}) | banned
        if generation.image_data:
            request["image_data"] = [image_url(image) for image in generation.image_data]
        if generation.image_data and self._renames_images:
            salt = f"{self._version} {self._changes}".encode()
            request["mm_hashes"] = [_image_hash(image, salt) for image in generation.image_data]
        return request

    async def abort(self, rid: str | None) -> int:
        running = self.in_flight
        await super().abort(rid)
        return running if rid is None else int(running > 0)

    async def pause(self, mode: PauseMode) -> None:
        await super().pause(mode)
        self._paused = mode

    async def resume(self) -> None:
        await super().resume()
        self._paused = None

    @property
    def ranks(self) -> int:
        return self._tensor_parallel

    async def update_weights(
        self, source: WeightsSource, version: str, running: RunningMode = "retract"
    ) -> WeightsConfirmation:
        mode: PauseMode = self._paused or running
        if mode == "in_place" and self._overlap:
            raise WeightsError(
                f"{self.name} cannot update its weights in_place: SGLang's overlap scheduler would label an old "
                "token with the new version. Start the server with --in-place-updates, or SGLang itself with "
                "--disable-overlap-schedule; or use retract"
            )

        if isinstance(source, SharedWeights):
            # It cannot map the shared file, but can load the same folder from disk once it is
            # complete.
            try:
                await asyncio.to_thread(await_shared, source.folder, version, STALLED_S)
            except (StalledError, OSError) as exc:
                raise WeightsError(str(exc)) from exc

        self._changes += 1
        try:
            checksum = await self._change(source, version, mode)
            self._version = version
        finally:
            self._changes += 1

        self._updates += 1
        return WeightsConfirmation(version, checksum)

    async def rename_weights(self, version: str) -> None:
        # Counted like an update: events of streams that run now do not tell the name's change.
        self._changes += 2
        await super().rename_weights(version)

    async def _change(self, source: WeightsSource, version: str, mode: PauseMode) -> str:
        if self._paused is None:
            # Without a pause it would wait until every running request has ended.
            await super().pause(mode)

        try:
            # in_place: running requests continue with the keys and values that they have.
            await self._load(source, {"weight_version": version, "flush_cache": mode != "in_place"})
            return await self._checksum()
        except RequestError as exc:
            raise WeightsError(exc.message) from exc
        finally:
            if self._paused is None:
                await super().resume()

    async def _load(self, source: WeightsSource, common: dict[str, Any]) -> None:
        if not isinstance(source, BroadcastWeights):
            request = {"model_path": str(source.folder), **common}
            await self.post("/update_weights_from_disk", request, self._update_timeout_s)
            return

        # Send one request for each bucket: it receives the tensors that one request names in one
        # broadcast.
        sizes = [tensor_bytes(dtype, shape) for dtype, shape in zip(source.dtypes, source.shapes, strict=True)]
        together = source.bucket_bytes is not None
        parts = buckets(sizes, source.bucket_bytes) if source.bucket_bytes else [range(len(sizes))]

        await self.post("/begin_weight_update", {}, self._update_timeout_s)
        for part in parts:
            request = {
                "names": [source.names[i] for i in part],
                "dtypes": [source.dtypes[i] for i in part],
                "shapes": [source.shapes[i] for i in part],
                "group_name": source.group,
                **({"load_format": "flattened_bucket"} if together else {}),
                **common,
            }
            await self.post("/update_weights_from_distributed", request, self._update_timeout_s)
        await self.post("/end_weight_update", {}, self._update_timeout_s)

    async def _checksum(self) -> str:
        """Return one checksum over SGLang's own tensors. Their names and layout differ from the
        published ones, so it can be compared only with that of other SGLang servers."""
        answer = await self.post("/weights_checker", {"action": "checksum"}, self._update_timeout_s)

        try:
            sums = {
                f"{index}.{name}": str(value)
                for index, rank in enumerate(answer["ranks"])
                for name, value in rank["checksums"].items()
            }
        except (KeyError, TypeError, AttributeError) as exc:
            raise WeightsError(f"{self.name} does not confirm a checksum: {exc!r}") from exc

        text = "\n".join(f"{name} {sums[name]}" for name in sorted(sums))
        return f"sglang:{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    async def memory(self, what: Literal["release", "resume"], tags: Sequence[str] | None) -> None:
        # On a CPU this request would end the server.
        if not self._on_gpu:
            raise Conflict(f"SGLang cannot {what} memory on a CPU: run it on a GPU")
        if tags is not None and not tags:  # SGLang would take it for all tags
            return
        await super().memory(what, tags)

    async def alive(self) -> None:
        await self.get("/model_info")  # its /health generates, which a pause blocks

    async def refresh(self) -> None:
        """Count the requests sent through this replica: SGLang's counters need a flag."""
        self._stats = EngineStats(running=self.in_flight, paused=self._paused is not None, weight_updates=self._updates)

    def _sampling_version(self) -> Callable[[], str | None]:
        # Only the last event of its streams names versions. Until then the version is certain as
        # long as no update has begun since the request was sent.
        changes, version = self._changes, self._version
        return lambda: version if changes == self._changes and changes % 2 == 0 else None

    def _version_of(self, version: str) -> str:
        return known_version(version)


def image_url(image: str) -> str:
    """Return base64 of an image as a data URL: SGLang opens other text as a file or an address."""
    return image if image.startswith("data:") else f"data:image/png;base64,{image}"


def _image_hash(image: str, salt: bytes) -> str:
    """Return SGLang's form of an image's identity: 64 bits in hexadecimal."""
    return hashlib.blake2b(image.encode(), digest_size=8, key=salt[:64]).hexdigest()


def known_version(version: str) -> str:
    """Translate SGLang's name of a version into ours: unnamed weights are version 0."""
    return "0" if version == UNNAMED_VERSION else version
