"""The source protocol, and the common part of sources that start a child process."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from agentloop.config.server import ServerSettings
from agentloop.runtime.child import Child
from rollout_server.engines.base import EngineInfo
from rollout_server.replica.base import Replica


class Source(Protocol):
    """The source of a replica: a process to start, or a URL."""

    @property
    def name(self) -> str: ...

    async def start(self) -> Replica:
        """Return a replica that answers.

        Raises:
            ServerStartError: it did not start.
        """
        ...

    async def ended(self) -> str:
        """Wait until its process ends, if it has one; return the reason."""
        ...

    async def stop(self, *, gently: bool) -> None:
        """Stop its process and everything that it started."""
        ...


class ChildSource:
    """A source whose replica is a child process.

    Args:
        settings: settings of the whole server.
        index: number of the replica, from 0.
        info: facts about its engine.
        log_dir: folder of the replicas' logs.
    """

    def __init__(self, settings: ServerSettings, index: int, info: EngineInfo, log_dir: Path) -> None:
        self.name = f"{settings.engine}-{index}"
        self._settings = settings
        self._index = index
        self._info = info
        self._log_file = log_dir / f"replica-{index}.log"
        self._child: Child | None = None

    async def ended(self) -> str:
        assert self._child is not None
        return f"its process ended with code {await self._child.ended()}"

    async def stop(self, *, gently: bool) -> None:
        if self._child is not None:
            await (self._child.stop() if gently else self._child.kill())
