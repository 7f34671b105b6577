"""The interface of weight transports on the run's side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, Self, TypeVar

from agentloop.config import Recipe
from trainer.publishing.server_link import ServerLink
from trainer.rank_commands import Command

R = TypeVar("R")

OnFolder = Callable[[int, Path], None]
"""Called with each version that a server can start from, and its folder."""


class Ranks(Protocol):
    """The part of a `WorkerGroup` that publishers need."""

    async def ask(self, command: Command[R]) -> R:
        """Run a command on all ranks and return rank 0's answer."""


class Publisher(ABC):
    """One transport, between the ranks and a running server.

    Args:
        folder: of the published versions.
    """

    def __init__(self, ranks: Ranks, server: ServerLink, folder: Path, on_folder: OnFolder) -> None:
        self._ranks = ranks
        self._server = server
        self._folder = folder
        self._on_folder = on_folder

    @classmethod
    def from_recipe(cls, recipe: Recipe, ranks: Ranks, server: ServerLink, folder: Path, on_folder: OnFolder) -> Self:
        """Create the publisher for a recipe. A transport with more options overrides this."""
        return cls(ranks, server, folder, on_folder)

    @staticmethod
    @abstractmethod
    async def write(ranks: Ranks, folder: Path, version: int) -> Path:
        """Write a version for a server to start from, and return its folder.

        The next version may be published while that server still reads it.
        """

    @abstractmethod
    async def publish(self, version: int) -> float:
        """Make the server serve the policy as `version`; return the seconds it took.

        Versions are published in order, without gaps.

        Raises:
            ServerError: the server did not serve it within the time limit.
            RequestRejected: the server refuses the weights.
        """

    async def close(self) -> None:  # noqa: B027  # optional: most transports hold nothing
        """Finish pending work and release the transport's resources."""
