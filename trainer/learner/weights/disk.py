"""Publish to disk: a Hugging Face folder for each version."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch.distributed as dist
from torch import Tensor

from agentloop.files import disk_errors, partial_of, rename_folder
from agentloop.weights.layout import Digest, TensorSpec, checksum, plan_file, tensor_bytes
from trainer.learner.weights.base import PublishedTensors, chunks, is_first_rank
from trainer.types import Published

MAX_SHARD_BYTES = 4 * 2**30


class DiskTransport:
    """Writes folders.

    Args:
        shard_bytes: size at which a file of a folder ends.
    """

    def __init__(self, tensors: PublishedTensors, *, shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self._tensors = tensors
        self._shard_bytes = shard_bytes

    def publish(self, *, folder: Path) -> Published:
        """Write a folder; it appears under its name when it is complete.

        Raises:
            DiskError: the disk is full.
        """
        if not is_first_rank():
            self._tensors.gather(None)
            dist.barrier()
            return Published("")

        partial = partial_of(folder)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with disk_errors(folder):
                partial.mkdir(parents=True)
                shards = Shards(partial, self._tensors.specs, self._shard_bytes)
                self._tensors.gather(shards.add)
                shards.close()
                self._tensors.write_config(partial)
                rename_folder(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

        # The other ranks return once the folder exists.
        dist.barrier()
        return Published(checksum(shards.digests))


class Shards:
    """Writes one safetensors file, or several with an index if the model is larger than one shard.

    Tensors must be added in the order of `specs`.
    """

    def __init__(self, folder: Path, specs: Sequence[TensorSpec], shard_bytes: int) -> None:
        self._folder = folder
        self.digests: dict[str, int] = {}

        parts: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
        size = 0
        for spec in specs:
            length = tensor_bytes(spec.dtype, spec.shape)
            if parts[-1] and size + length > shard_bytes:
                parts.append([])
                size = 0
            parts[-1].append((spec.name, spec.dtype, spec.shape))
            size += length

        count = len(parts)
        self._names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        if count == 1:
            self._names = ["model.safetensors"]
        # `specs` are sorted as `plan_file` sorts, so a plan of each part keeps the order of the
        # whole.
        self._headers = [plan_file(part)[0] for part in parts]
        self._ends = [part[-1][0] for part in parts if part]
        self._index = {name: file for file, part in zip(self._names, parts, strict=True) for name, _, _ in part}
        self._number = 0
        self._file: IO[bytes] | None = None

    def add(self, spec: TensorSpec, tensor: Tensor) -> None:
        """Write the next tensor."""
        if self._file is None:
            self._file = (self._folder / self._names[self._number]).open("wb", buffering=0)
            self._file.write(self._headers[self._number])

        digest = Digest("")
        for chunk in chunks(tensor, spec.dtype):
            digest.add(chunk)
            view = chunk.data
            while view:  # an unbuffered write may be partial
                view = view[self._file.write(view) :]
        self.digests[spec.name] = digest.value

        if spec.name == self._ends[self._number]:
            self._file.close()
            self._file = None
            self._number += 1

    def close(self) -> None:
        """Write the index, if there are several files."""
        if len(self._names) > 1:
            total = sum((self._folder / name).stat().st_size for name in self._names)
            index = {"metadata": {"total_size": total}, "weight_map": self._index}
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
