"""The engine's end of the groups in which a trainer broadcasts weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from agentloop.weights.group import broadcast, connect_store, join_group, leave_group
from agentloop.weights.layout import TensorSpec, buckets
from rollout_server.engines.base import BroadcastWeights, UpdateGroup
from rollout_server.errors import WeightsError


class Groups:
    """By name. Called on any thread but the engine's, one call at a time."""

    def __init__(self) -> None:
        self._groups: dict[str, tuple[Any, torch.device]] = {}

    def join(self, group: UpdateGroup, device: torch.device) -> None:
        """Meet the trainer; a group of the same name is left first.

        Raises:
            WeightsError: it did not come about.
        """
        self.leave(group.name)
        if group.backend == "nccl" and device.type != "cuda":
            raise WeightsError(f"this engine runs on {device}: it can join groups of backend gloo only")
        try:
            store = connect_store(group.address, group.port)
            joined = join_group(
                store,
                rank=group.rank,
                world_size=group.world_size,
                name=group.name,
                backend=group.backend,
            )
        except (RuntimeError, ValueError) as exc:
            raise WeightsError(
                f"group {group.name!r} at {group.address}:{group.port} did not come about: {exc}"
            ) from exc
        self._groups[group.name] = joined, device if group.backend == "nccl" else torch.device("cpu")

    def leave(self, name: str) -> bool:
        """False: there is none of this name."""
        group = self._groups.pop(name, None)
        if group is not None:
            leave_group(group[0])
        return group is not None

    def close(self) -> None:
        for name in list(self._groups):
            self.leave(name)

    def device(self, name: str) -> torch.device:
        """Where broadcasts of a group arrive.

        Raises:
            WeightsError: there is no such group.
        """
        if name not in self._groups:
            raise WeightsError(f"this engine is in no group {name!r}: initialize it first")
        return self._groups[name][1]

    def receive(self, source: BroadcastWeights, specs: Sequence[TensorSpec], whole: torch.Tensor) -> None:
        """Fill `whole`, flat uint8, with the tensors in a row.

        Raises:
            WeightsError: the broadcast broke off. The group is left.
        """
        group, _ = self._groups[source.group]
        sizes = [spec.end - spec.begin for spec in specs]
        try:
            if source.bucket_bytes is None:
                for spec in specs:
                    place = whole[spec.begin : spec.end]
                    tensor = place.clone().view(getattr(torch, spec.dtype)).view(spec.shape)
                    broadcast(group, tensor)
                    place.copy_(tensor.view(-1).view(torch.uint8))
            else:
                for bucket in buckets(sizes, source.bucket_bytes):
                    broadcast(group, whole[specs[bucket[0]].begin : specs[bucket[-1]].end])
        except RuntimeError as exc:
            self.leave(source.group)
            raise WeightsError(f"the broadcast broke off: {exc}") from exc
