"""SGLang as an engine: how it is started, and where its dialect differs from ours.

It runs in an environment of its own, because its pins of torch and transformers are not the trainer's. Nothing of it
is imported here.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from agentloop.weights.layout import buckets, tensor_bytes
from agentloop.weights.shared import STALLED_S, StalledError, await_shared
from rollout_server.engines.base import (
    BroadcastWeights,
    EngineError,
    EngineStats,
    Generation,
    GenerationResult,
    PauseMode,
    RunningMode,
    SharedWeights,
    WeightsConfirmation,
    WeightsError,
    WeightsSource,
)
from rollout_server.errors import HttpError, bad_request
from rollout_server.replica.http import HttpReplica
from rollout_server.settings import ServerSettings

CPU_TOTAL_TOKENS = 200_000
"""KV cache on a CPU, in tokens: what SGLang would take by itself is a share of all memory."""

UNNAMED_VERSION = "default"
"""What SGLang calls weights that nobody named."""


def sglang_command(settings: ServerSettings, index: int, port: int) -> list[str]:
    """The command line of one replica."""
    command = [
        settings.python or sys.executable, "-m", "sglang.launch_server",
        "--model-path", settings.model, "--host", "127.0.0.1", "--port", str(port),
        "--dtype", settings.dtype, "--random-seed", str(settings.seed + index),
        "--max-running-requests", str(settings.max_running), "--weight-version", settings.first_version,
        "--skip-tokenizer-init", "--incremental-streaming-output", "--log-level", "warning",
        "--enable-fp32-lm-head",  # as the torch engine: logits rounded to 16 bits are the largest part of the mismatch
    ]  # fmt: skip
    device = settings.device.partition(":")[0]
    if device == "cpu":
        # Its own kernels need AMX and a build of their own; this path runs on any CPU.
        command += ["--device", "cpu", "--model-impl", "transformers", "--attention-backend", "torch_native"]
        command += ["--max-total-tokens", str(settings.max_kv_tokens or CPU_TOTAL_TOKENS)]
        command += ["--sleep-on-idle"]  # it would keep a core busy that trainer and tools share
    else:
        command += ["--device", device, "--base-gpu-id", str(index * settings.gpus_per_replica)]
        command += ["--tp-size", str(settings.gpus_per_replica)]
        if settings.max_kv_tokens is not None:
            command += ["--max-total-tokens", str(settings.max_kv_tokens)]
    if settings.context_length is not None:
        command += ["--context-length", str(settings.context_length)]
    return [*command, *settings.engine_args]


def sglang_environment(settings: ServerSettings, index: int) -> dict[str, str]:
    """The environment of one replica: ours without what belongs to our interpreter."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[name] = str(settings.threads)
    if settings.python and "/" in settings.python:
        # Tools that it starts (ninja, triton's compiler) are beside its interpreter.
        environment["PATH"] = f"{Path(settings.python).absolute().parent}:{environment.get('PATH', '')}"
    return environment


class SglangReplica(HttpReplica):
    """A bare SGLang server."""

    _paused: PauseMode | None = None
    _updates = 0
    _changes = 0  # beginnings and ends of updates
    on_gpu = False
    tensor_parallel = 1

    async def is_up(self) -> bool:
        """Whether it has started; a generation is part of its own start."""
        try:
            await self.get("/model_info")
            await self.get("/health")
        except EngineError:
            return False
        return True

    async def generate(self, generation: Generation) -> GenerationResult:
        if generation.sampling.min_new_tokens:
            raise bad_request(
                "SGLang without a tokenizer does not know min_new_tokens", "sampling_params.min_new_tokens"
            )
        return await super().generate(generation)

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
        return self.tensor_parallel

    async def update_weights(
        self, source: WeightsSource, version: str, running: RunningMode = "retract"
    ) -> WeightsConfirmation:
        mode: PauseMode = self._paused or running
        if isinstance(source, SharedWeights):
            # It knows no shared memory; the same folder can be loaded from disk as soon as it is complete.
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

    async def _change(self, source: WeightsSource, version: str, mode: PauseMode) -> str:
        if self._paused is None:
            # Unpaused it would wait until every request has ended.
            await super().pause(mode)
        try:
            # Kept: requests that run go on with the keys and values that they have.
            await self._load(source, {"weight_version": version, "flush_cache": mode != "in_place"})
            return await self._checksum()
        except HttpError as exc:
            raise WeightsError(exc.message) from exc
        finally:
            if self._paused is None:
                await super().resume()

    async def _load(self, source: WeightsSource, common: dict[str, Any]) -> None:
        if not isinstance(source, BroadcastWeights):
            request = {"model_path": str(source.folder), **common}
            await self.post("/update_weights_from_disk", request, self._update_timeout_s)
            return
        # One request for each bucket: it receives in one broadcast what one request names.
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
        """One checksum of SGLang's own tensors, whose names and layout are not the published ones: it can be compared
        with that of other SGLang servers only."""
        answer = await self.post("/weights_checker", {"action": "checksum"}, self._update_timeout_s)
        try:
            sums = {
                f"{index}.{name}": str(value)
                for index, rank in enumerate(answer["ranks"])
                for name, value in rank["checksums"].items()
            }
        except (KeyError, TypeError, AttributeError) as exc:
            raise WeightsError(f"{self.name} confirms no checksum: {exc!r}") from exc
        text = "\n".join(f"{name} {sums[name]}" for name in sorted(sums))
        return f"sglang:{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    async def memory(self, what: Literal["release", "resume"], tags: Sequence[str] | None) -> None:
        # Sent to SGLang on a CPU it ends the server.
        if not self.on_gpu:
            raise HttpError(409, "conflict", f"SGLang cannot {what} memory here: it runs on a CPU")
        await super().memory(what, tags)

    async def alive(self) -> None:
        await self.get("/model_info")  # its /health generates, which a pause holds up

    async def refresh(self) -> None:
        """It counts in a text format of its own, behind a flag; what the router counts has to do."""
        self._stats = EngineStats(running=self.in_flight, paused=self._paused is not None, weight_updates=self._updates)

    async def read_version(self) -> None:
        self._version = self._version_of(str((await self.get("/model_info")).get("weight_version", UNNAMED_VERSION)))

    def _sampling_version(self) -> Callable[[], str | None]:
        # Only the last event of its streams names versions.
        changes, version = self._changes, self._version
        return lambda: version if changes == self._changes and changes % 2 == 0 else None

    def _version_of(self, version: str) -> str:
        return "0" if version == UNNAMED_VERSION else version
