"""Stage a new policy version beside the served one, verify all of it, and only then swap it in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from agentloop.weights.layout import LayoutError
from agentloop.weights.shared import StalledError
from rollout_server.engines.base import BroadcastWeights, FolderWeights, SharedWeights, WeightsSource
from rollout_server.engines.torch_engine.weights.base import LiveWeights, StagedWeights, Transport
from rollout_server.engines.torch_engine.weights.broadcast import BroadcastTransport, WeightGroups
from rollout_server.engines.torch_engine.weights.disk import DiskTransport
from rollout_server.engines.torch_engine.weights.shared import SharedTransport
from rollout_server.errors import WeightsError


class WeightLoader:
    """Loads published versions into one model."""

    def __init__(self, model: Any) -> None:
        self._live = LiveWeights(model)
        self.groups = WeightGroups()
        self._transports: Mapping[type, Transport[Any]] = {
            FolderWeights: DiskTransport(self._live),
            SharedWeights: SharedTransport(self._live),
            BroadcastWeights: BroadcastTransport(self._live, self.groups),
        }

    def stage(self, source: WeightsSource, version: str = "") -> StagedWeights:
        """Read all tensors of the model; verify names, shapes, finite values and checksum.

        One call at a time, on any thread but the engine's. Nothing that is served changes.

        Raises:
            WeightsError: names the first mismatch.
        """
        try:
            staged = self._transports[type(source)].stage(source, version)
        except (LayoutError, StalledError, OSError) as exc:
            raise WeightsError(str(exc)) from exc
        if source.checksum is not None and staged.checksum != source.checksum:
            raise WeightsError(
                f"checksum mismatch: {staged.checksum} arrived, the trainer published {source.checksum}; publish again"
            )
        return staged

    def swap_in(self, staged: StagedWeights) -> list[torch.Tensor]:
        """Serve staged weights; call it between two steps.

        Returns the tensors served before, to be freed on another thread: freeing gigabytes takes
        long.
        """
        return self._live.swap_in(staged)
