"""The weight transports by the names that recipes use (`rollout.publish.transport`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from agentloop.config import Recipe
from trainer.publishing.base import OnFolder, Publisher, Ranks
from trainer.publishing.broadcast import BroadcastPublisher
from trainer.publishing.disk import DiskPublisher
from trainer.publishing.server_link import ServerLink
from trainer.publishing.shared import SharedPublisher

TRANSPORTS: Mapping[str, type[Publisher]] = MappingProxyType(
    {"disk": DiskPublisher, "shm": SharedPublisher, "distributed": BroadcastPublisher}
)


def make_publisher(recipe: Recipe, ranks: Ranks, server: ServerLink, folder: Path, on_folder: OnFolder) -> Publisher:
    """Create the publisher of the transport that the recipe names.

    Args:
        folder: of the published versions.
    """
    return TRANSPORTS[recipe.rollout.publish.transport].from_recipe(recipe, ranks, server, folder, on_folder)


async def write_version(recipe: Recipe, ranks: Ranks, folder: Path, version: int) -> Path:
    """Write the policy for a server to start from, by the recipe's transport; return its folder."""
    return await TRANSPORTS[recipe.rollout.publish.transport].write(ranks, folder, version)
