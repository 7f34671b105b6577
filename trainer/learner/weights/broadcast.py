"""Publish by broadcast: rank 0 sends the tensors to the engines in a weight update group."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from agentloop.weights.group import broadcast, join_group, leave_group, open_store
from agentloop.weights.layout import Digest, TensorSpec, buckets, checksum
from trainer.learner.weights.base import PublishedTensors, chunks, is_first_rank
from trainer.learner.weights.shared import SharedTransport
from trainer.types import Published


class BroadcastTransport:
    """Broadcasts in groups that are opened and joined first. Only rank 0 is a member.

    Args:
        shared: writes the copies.
    """

    def __init__(self, tensors: PublishedTensors, shared: SharedTransport) -> None:
        self._tensors = tensors
        self._shared = shared
        self._store: Any = None
        self._groups: dict[str, tuple[Any, str]] = {}

    def publish(self, *, group: str, bucket_bytes: int, folder: Path | None) -> Published:
        """Broadcast to the engines.

        Args:
            bucket_bytes: size at which one broadcast ends.
            folder: also write a copy here, as the shared transport does.

        Returns:
            with `error`: why the broadcast failed. The copy is written in any case.
        """
        if not is_first_rank():
            self._tensors.gather(None)
            return Published("")
        sender = _BucketSender(self._groups.get(group), self._tensors.specs, bucket_bytes)
        copy = self._shared.open(folder) if folder is not None else None

        def add(spec: TensorSpec, tensor: Tensor) -> None:
            tensor = tensor.to(getattr(torch, spec.dtype))
            if copy is not None:
                copy.add(spec, tensor)
            sender.add(spec, tensor)

        self._tensors.gather(add)
        return Published(copy.finish() if copy is not None else checksum(sender.digests), sender.error)

    def open_group(self, address: str) -> int:
        """Open the rendezvous store of a group; return its port, on rank 0."""
        if not is_first_rank():
            return 0
        self._store = open_store(address)
        return int(self._store.port)

    def join_group(self, name: str, world_size: int, backend: Literal["nccl", "gloo"]) -> str:
        """Wait for the engines to join; return why that failed, or an empty string."""
        if not is_first_rank():
            return ""
        try:
            group = join_group(self._store, rank=0, world_size=world_size, name=name, backend=backend)
        except (RuntimeError, ValueError) as exc:
            return str(exc) or type(exc).__name__
        self._groups[name] = group, "cuda" if backend == "nccl" else "cpu"
        return ""

    def leave_group(self, name: str) -> None:
        """Close a group, if it is open."""
        group = self._groups.pop(name, None)
        if group is not None:
            leave_group(group[0])
        self._store = None


class _BucketSender:
    """Broadcasts tensors in buckets; after a failure it sends nothing, while the ranks still
    gather.

    Args:
        group: the process group and its device; None: there is none, and every broadcast fails.
    """

    def __init__(self, group: tuple[Any, str] | None, specs: Sequence[TensorSpec], bucket_bytes: int) -> None:
        sizes = [spec.end - spec.begin for spec in specs]
        self._group = group
        self._ends = {specs[bucket[-1]].name for bucket in buckets(sizes, bucket_bytes)}
        self._bucket: list[Tensor] = []
        self.digests: dict[str, int] = {}
        self.error = "" if group is not None else "the trainer has not joined the weight update group"

    def add(self, spec: TensorSpec, tensor: Tensor) -> None:
        """Add a tensor in the published dtype; send the bucket that it completes."""
        self._bucket.append(tensor.reshape(-1).view(torch.uint8))
        digest = Digest("")
        for chunk in chunks(tensor, spec.dtype):
            digest.add(chunk)
        self.digests[spec.name] = digest.value

        if spec.name in self._ends:
            self._send()
            self._bucket = []

    def _send(self) -> None:
        if self._group is None or self.error:
            return
        group, device = self._group
        try:
            broadcast(group, torch.cat(self._bucket).to(device))
        except RuntimeError as exc:
            self.error = str(exc) or type(exc).__name__
