"""All transports of one rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import validate_call

from trainer.learner.weights.base import PublishedTensors, Transport
from trainer.learner.weights.broadcast import BroadcastTransport
from trainer.learner.weights.disk import DiskTransport
from trainer.learner.weights.shared import SharedTransport
from trainer.types import Published


class WeightPublisher:
    """Publishes the policy of a rank.

    Args:
        lm: the language model, sharded or not.
        dtype: of the published parameters.
    """

    def __init__(self, lm: Any, dtype: str) -> None:
        self.tensors = PublishedTensors(lm, dtype)
        self.disk = DiskTransport(self.tensors)
        self.shared = SharedTransport(self.tensors)
        self.broadcast = BroadcastTransport(self.tensors, self.shared)

    @property
    def transports(self) -> Mapping[str, Transport]:
        """The transports by name. A new one is added here."""
        return {"disk": self.disk, "shared": self.shared, "broadcast": self.broadcast}

    def publish(self, transport: str, options: Mapping[str, Any]) -> Published:
        """Publish through one transport; all ranks call it together.

        Args:
            options: keyword arguments of the transport's `publish`, as JSON.

        Raises:
            ValueError: an option is missing, unknown or of another type.
            KeyError: there is no such transport.
        """
        return validate_call(self.transports[transport].publish)(**options)
