"""Weights published by broadcast, from rank 0 of a process group of trainer and engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from agentloop.weights.group import broadcast, connect_store, join_group, leave_group
from agentloop.weights.layout import TensorSpec, buckets, digest_of, tensor_bytes
from rollout_server.engines.base import BroadcastWeights, UpdateGroup
from rollout_server.engines.torch_engine.weights.base import LiveWeights, StagedWeights
from rollout_server.errors import WeightsError


class BroadcastTransport:
    """Stages `BroadcastWeights`."""

    def __init__(self, live: LiveWeights, groups: WeightGroups) -> None:
        self._live = live
        self._groups = groups

    def stage(self, source: BroadcastWeights, version: str) -> StagedWeights:
        """Receive the tensors of a version. The layout is checked before anything is received."""
        specs = _specs_of(source)
        check = self._live.check("the broadcast", specs)
        device = self._groups.device(source.group)
        size = specs[-1].end if specs else 0
        memory = self._live.memory(size) if device.type == "cpu" else None
        whole = torch.empty(size, dtype=torch.uint8, device=device) if memory is None else torch.from_numpy(memory)
        self._groups.receive(source, specs, whole)

        tensors = []
        for spec in specs:
            place = whole[spec.begin : spec.end]
            check.add(spec, digest_of(place.cpu().numpy(), spec.dtype))
            tensors.append((spec, place))
        return check.staged(tensors, memory)


class WeightGroups:
    """The groups that this engine is in, by name. One call at a time, on any thread but the
    engine's."""

    def __init__(self) -> None:
        self._groups: dict[str, tuple[Any, torch.device]] = {}

    def join(self, group: UpdateGroup, device: torch.device) -> None:
        """Join the trainer's group. First leave a group of the same name.

        Raises:
            WeightsError: the group could not be formed.
        """
        self.leave(group.name)
        if group.backend == "nccl" and device.type != "cuda":
            raise WeightsError(f"this engine runs on {device} and cannot join an nccl group; use backend gloo")
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
                f"joining weights group {group.name!r} at {group.address}:{group.port} failed: {exc}"
            ) from exc
        self._groups[group.name] = joined, device if group.backend == "nccl" else torch.device("cpu")

    def leave(self, name: str) -> bool:
        """Leave a group; return False if there is none of this name."""
        group = self._groups.pop(name, None)
        if group is not None:
            leave_group(group[0])
        return group is not None

    def close(self) -> None:
        """Leave all groups."""
        for name in list(self._groups):
            self.leave(name)

    def device(self, name: str) -> torch.device:
        """The device on which a group's broadcasts arrive.

        Raises:
            WeightsError: there is no such group.
        """
        if name not in self._groups:
            raise WeightsError(f"this engine is not in a weights group {name!r}: call /init_weights_update_group first")
        return self._groups[name][1]

    def receive(self, source: BroadcastWeights, specs: Sequence[TensorSpec], whole: torch.Tensor) -> None:
        """Fill `whole`, flat uint8, with the concatenated tensors.

        Raises:
            WeightsError: the broadcast failed. The engine leaves the group, which is unusable then.
        """
        group, _ = self._groups[source.group]
        sizes = [spec.end - spec.begin for spec in specs]
        try:
            if source.bucket_bytes is None:
                for spec in specs:
                    place = whole[spec.begin : spec.end]
                    # A tensor of its dtype, as SGLang's senders broadcast it; its place may not be
                    # aligned for that.
                    tensor = place.clone().view(getattr(torch, spec.dtype)).view(spec.shape)
                    broadcast(group, tensor)
                    place.copy_(tensor.view(-1).view(torch.uint8))
            else:
                for bucket in buckets(sizes, source.bucket_bytes):
                    broadcast(group, whole[specs[bucket[0]].begin : specs[bucket[-1]].end])
        except RuntimeError as exc:
            self.leave(source.group)
            raise WeightsError(f"the broadcast failed: {exc}; join the group again") from exc


def _specs_of(source: BroadcastWeights) -> list[TensorSpec]:
    """Concatenated tensors, in the order of the broadcasts."""
    specs, at = [], 0
    for name, dtype, shape in zip(source.names, source.dtypes, source.shapes, strict=True):
        size = tensor_bytes(dtype, shape)
        specs.append(TensorSpec(name, dtype, tuple(shape), at, at + size))
        at += size
    return specs
