"""How a rank hands the policy out: to a folder, to a file in shared memory, to a weights group.

Parameters are gathered one by one (all ranks take part), cast to the published dtype and written where they belong, so
that no second copy of the model comes about.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from agentloop.files import partial_of, rename_folder
from agentloop.weights.group import broadcast, join_group, leave_group, open_store
from agentloop.weights.layout import CODES, Digest, TensorSpec, buckets, checksum, plan_file, tensor_bytes
from agentloop.weights.shared import PIECE, SharedWriter
from trainer.learner.model.lora import adapters, base_name, is_adapter, merged
from trainer.learner.model.policy import DTYPES

MAX_SHARD_BYTES = 4 * 2**30

PART = 2**19
"""Bytes that are copied and then hashed in one go: long enough for a copy at full speed, short enough to be still in
the core's caches."""

Take = Callable[[TensorSpec, Tensor], None]
"""What is done on rank 0 with a whole tensor of the published dtype, or one that is still to be cast to it."""


class WeightPublisher:
    """The published tensors of one model: their layout, and the ways out.

    Args:
        lm: the language model, sharded or not.
        dtype: in which its parameters are published.
        shard_bytes: size at which a file of a folder ends.
    """

    def __init__(self, lm: nn.Module, dtype: str, *, shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self._lm = lm
        self._shard_bytes = shard_bytes
        self._dtype = dtype
        self._writers: dict[Path, SharedWriter] = {}
        self._store: Any = None
        self._groups: dict[str, tuple[Any, str]] = {}
        state = lm.state_dict().keys()
        # Tied weights appear once, under their first name; adapters within what they are added to.
        self._tensors: dict[str, Tensor] = {
            base_name(name): parameter for name, parameter in lm.named_parameters() if not is_adapter(name)
        }
        self._adapters = adapters(lm)
        self._parameters = frozenset(self._tensors)
        self._tensors |= {name: buffer for name, buffer in lm.named_buffers() if name in state}
        self.header, self.specs = plan_file((name, self._dtype_of(name), t.shape) for name, t in self._tensors.items())

    @property
    def layout(self) -> list[tuple[str, str, list[int]]]:
        """Name, dtype and shape of each tensor, in the order of files and broadcasts."""
        return [(spec.name, spec.dtype, list(spec.shape)) for spec in self.specs]

    def to_folder(self, folder: Path) -> str:
        """Write a Hugging Face folder, which appears under its name when it is whole; returns the checksum."""
        partial = partial_of(folder)
        shards = (
            Shards(partial, [(s.name, s.dtype, s.shape) for s in self.specs], self._shard_bytes) if _first() else None
        )
        if shards is not None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self._gather(shards.take if shards is not None else None)
        if shards is not None:
            shards.close()
            write_config(self._lm, self._dtype, partial)
            rename_folder(partial, folder)
        dist.barrier()
        return checksum(shards.digests) if shards is not None else ""

    def to_shared(self, folder: Path, *, reader_s: float = 0.0) -> str:
        """Write `folder/model.safetensors` over the version that is in it, for readers that follow.

        Args:
            reader_s: how long to wait for the first of them.
        """
        taker = self._open_shared(folder, reader_s) if _first() else None
        self._gather(taker.take if taker is not None else None)
        if taker is None:
            return ""
        return taker.finish()

    def to_group(self, name: str, bucket_bytes: int, folder: Path | None) -> tuple[str, str]:
        """Broadcast to the engines and, with `folder`, write a copy as `to_shared` does.

        Returns:
            the checksum, and why the broadcast broke off; empty when it did not.
        """
        if not _first():
            self._gather(None)
            return "", ""
        sender = _Sender(self._groups.get(name), self.specs, bucket_bytes)
        kept = self._open_shared(folder) if folder is not None else None

        def take(spec: TensorSpec, tensor: Tensor) -> None:
            tensor = tensor.to(getattr(torch, spec.dtype))
            if kept is not None:
                kept.take(spec, tensor)
            sender.take(spec, tensor)

        self._gather(take)
        if kept is not None:
            return kept.finish(), sender.error
        return checksum(sender.digests), sender.error

    def open_group(self, address: str) -> int:
        """Open the store where a group meets; returns its port, on rank 0."""
        if not _first():
            return 0
        self._store = open_store(address)
        return int(self._store.port)

    def join_group(self, name: str, world_size: int, backend: str) -> str:
        """Meet the engines; returns why they did not come, or an empty text."""
        if not _first():
            return ""
        try:
            group = join_group(self._store, rank=0, world_size=world_size, name=name, backend=backend)
        except (RuntimeError, ValueError) as exc:
            return str(exc) or type(exc).__name__
        self._groups[name] = group, "cuda" if backend == "nccl" else "cpu"
        return ""

    def leave_group(self, name: str) -> None:
        group = self._groups.pop(name, None)
        if group is not None:
            leave_group(group[0])
        self._store = None

    def _dtype_of(self, name: str) -> str:
        return self._dtype if name in self._parameters else str(self._tensors[name].dtype).removeprefix("torch.")

    @torch.no_grad()
    def _gather(self, take: Take | None) -> None:
        for spec in self.specs:
            tensor = _whole(self._tensors[spec.name])
            if spec.name in self._adapters:
                a, b, factor = self._adapters[spec.name]
                tensor = merged(tensor, _whole(a), _whole(b), factor)
            if take is not None:
                take(spec, tensor)

    def _open_shared(self, folder: Path, reader_s: float = 0.0) -> _SharedTaker:
        writer = self._writers.get(folder)
        if writer is None:
            writer = self._writers[folder] = SharedWriter(folder)
            write_config(self._lm, self._dtype, folder)
        writer.open(self.header, self.specs[-1].end)
        if reader_s:
            writer.progress.wait_for_reader(reader_s)
        return _SharedTaker(writer)


def write_config(lm: Any, dtype: str, folder: Path) -> None:
    """Write `config.json` and `generation_config.json` of a model whose weights are saved in `dtype`."""
    config = copy.deepcopy(lm.config)
    config.dtype = DTYPES[dtype]
    config.architectures = [type(lm).__name__]
    config.save_pretrained(folder)
    if lm.can_generate():
        lm.generation_config.to_json_file(folder / "generation_config.json")


class _SharedTaker:
    """Puts tensors into their place in a shared file."""

    def __init__(self, writer: SharedWriter) -> None:
        self._writer = writer
        self._digests: dict[str, int] = {}

    def take(self, spec: TensorSpec, tensor: Tensor) -> None:
        data, progress = self._writer.data, self._writer.progress
        digest = Digest("")
        add = digest.add
        at = reached = spec.begin
        for chunk in _chunks(tensor, spec.dtype):
            end = at + len(chunk)
            place = data[at:end]
            place[:] = chunk
            add(place)  # it is still in the core's cache
            at = end
            if at - reached >= PIECE:
                progress.reach(at)
                reached = at
        progress.reach(spec.end)
        self._digests[spec.name] = digest.value

    def finish(self) -> str:
        whole = checksum(self._digests)
        self._writer.progress.finish(whole)
        return whole


class Shards:
    """Writes one file, or several with an index where the model is larger than one shard."""

    def __init__(self, folder: Path, tensors: list[tuple[str, str, tuple[int, ...]]], shard_bytes: int) -> None:
        self._folder = folder
        self.digests: dict[str, int] = {}
        parts: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
        size = 0
        for tensor in tensors:
            length = tensor_bytes(tensor[1], tensor[2])
            if parts[-1] and size + length > shard_bytes:
                parts.append([])
                size = 0
            parts[-1].append(tensor)
            size += length
        count = len(parts)
        self._names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        if count == 1:
            self._names = ["model.safetensors"]
        # Planned again by shard: the order of the whole is kept.
        self._parts = [plan_file(part)[0] for part in parts]
        self._ends = [part[-1][0] for part in parts if part]
        self._index = {t[0]: name for name, part in zip(self._names, parts, strict=True) for t in part}
        self._number = 0
        self._file: Any = None

    def take(self, spec: TensorSpec, tensor: Tensor) -> None:
        if self._file is None:
            self._file = (self._folder / self._names[self._number]).open("wb", buffering=0)
            self._file.write(self._parts[self._number])
        digest = Digest("")
        for chunk in _chunks(tensor, spec.dtype):
            digest.add(chunk)
            view = chunk.data
            while view:
                view = view[self._file.write(view) :]
        self.digests[spec.name] = digest.value
        if spec.name == self._ends[self._number]:
            self._file.close()
            self._file = None
            self._number += 1

    def close(self) -> None:
        if len(self._names) > 1:
            total = sum((self._folder / name).stat().st_size for name in self._names)
            index = {"metadata": {"total_size": total}, "weight_map": self._index}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


class _Sender:
    """Broadcasts tensors in buckets. After a failure it goes on without sending: the other ranks still gather."""

    def __init__(self, group: tuple[Any, str] | None, specs: list[TensorSpec], bucket_bytes: int) -> None:
        sizes = [spec.end - spec.begin for spec in specs]
        self._group, self._device = group or (None, "cpu")
        self._ends = {specs[bucket[-1]].name for bucket in buckets(sizes, bucket_bytes)}
        self._bucket: list[Tensor] = []
        self.digests: dict[str, int] = {}
        self.error = "" if group is not None else "the trainer is in no group"

    def take(self, spec: TensorSpec, tensor: Tensor) -> None:
        flat = tensor.reshape(-1).view(torch.uint8)
        self._bucket.append(flat)
        digest = Digest("")
        for chunk in _chunks(tensor, spec.dtype):
            digest.add(chunk)
        self.digests[spec.name] = digest.value
        if spec.name in self._ends:
            if not self.error:
                try:
                    broadcast(self._group, torch.cat(self._bucket).to(self._device))
                except RuntimeError as exc:
                    self.error = str(exc) or type(exc).__name__
            self._bucket = []


def _chunks(tensor: Tensor, dtype: str) -> Iterator[np.ndarray]:
    """The bytes of a tensor in `dtype`, in pieces that stay in a core's cache."""
    wanted = getattr(torch, dtype)
    if tensor.device.type != "cpu":
        tensor = tensor.to("cpu", wanted)
    flat = tensor.reshape(-1)
    if flat.dtype == wanted:
        data = flat.view(torch.uint8).numpy()
        for begin in range(0, len(data), PART):
            yield data[begin : begin + PART]
        return
    step = PART // CODES[dtype][1]
    scratch = torch.empty(step, dtype=wanted)
    for begin in range(0, len(flat), step):
        part = flat[begin : begin + step]
        cast = scratch[: len(part)].copy_(part)
        yield cast.view(torch.uint8).numpy()


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; all ranks take part."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local() if tensor.device_mesh.size() == 1 else tensor.full_tensor()
    return tensor


def _first() -> bool:
    return dist.get_rank() == 0
