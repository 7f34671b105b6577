"""What a launcher starts, and what it returns."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from agentloop.runtime.child import Child

Role = Literal["rank", "agent", "server"]
"""What a process is for; a launcher of a cluster has room for each."""


@dataclass(frozen=True)
class Program:
    """A module to run with `python -m`.

    Attributes:
        name: of the process, one in a run: `trainer_rank0`.
        role: what it is for.
        number: among those of its role, from 0.
        module, arguments: what is run. The launcher adds how the main process is reached.
        environment: the whole environment of a child on this machine.
        variables: what is set on another machine, over that machine's own environment.
        log: takes what it prints; appended to.
    """

    name: str
    role: Role
    number: int
    module: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    variables: Mapping[str, str]
    log: Path


class Launched(Protocol):
    """A process that was started, and the connection to it.

    Attributes:
        sock: our end of the connection, not yet read from.
    """

    sock: socket.socket

    @property
    def pid(self) -> int:
        """Its id, on its machine."""

    @property
    def stopped(self) -> bool:
        """Whether it is stopped by a signal (SIGSTOP)."""

    async def wait(self) -> int:
        """Wait until it ends; return its exit code, negative for a signal."""

    def kill(self) -> None:
        """Kill it, if it runs."""

    def log_tail(self) -> str:
        """Return the last lines that it has printed, indented."""


class Launcher(Protocol):
    """Starts the processes of a run.

    Attributes:
        local: they are children of this process: ranks meet at a file.
        one_machine: they are on this machine, and share its memory.
    """

    local: bool
    one_machine: bool

    @property
    def host(self) -> str | None:
        """Address at which the rollout server listens; None: the recipe's."""

    async def start(self, program: Program) -> Launched:
        """Start a process that talks with this one over a connection.

        Raises:
            WorkerError: it ended, or did not connect in time.
        """

    async def start_server(self, title: str, program: Program) -> Child:
        """Start a process that is reached over HTTP, and ends with this one.

        Args:
            title: of the process, for messages.
        """
