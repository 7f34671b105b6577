"""One rank process, seen from the main process: start it, exchange messages, end it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agentloop.config import TrainerConfig
from agentloop.errors import WorkerError
from agentloop.faults import error_from_json
from agentloop.launch.base import Launched, Launcher, Program
from agentloop.runtime.child import child_environment
from agentloop.runtime.early import ROOT, EarlyProgram
from trainer.channel import HEADER_LENGTH_BYTES, array_bytes, decode_header, encode, header_length

CLOSE_TIMEOUT_S = 10.0
"""Time for a rank to end by itself, and again after it was killed."""

MODULE = "trainer.learner.process"

RawAnswer = tuple[Any, list[np.ndarray]]
"""JSON body and arrays of an answer."""


class RankLost(WorkerError):
    """A rank process ended or does not answer; the group cannot go on without it."""


class RankDied(RankLost):
    """A rank process ended. Errors of other ranks at that moment are consequences."""


class Rank:
    """One process and its socket."""

    def __init__(
        self, number: int, process: Launched, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, log: Path
    ) -> None:
        self.number = number
        self.process = process
        self.log = log
        self._reader = reader
        self._writer = writer

    @classmethod
    async def spawn(cls, number: int, *, threads: int, log: Path, launcher: Launcher) -> Rank:
        """Start the process; its first message must be `rank_commands.Start`.

        Args:
            threads: intra-op threads of the process.
            log: receives what it prints; appended to.
            launcher: starts it.

        Raises:
            WorkerError: it does not connect; only where it is no child of this process.
        """
        program = Program(
            name=f"trainer_rank{number}",
            role="rank",
            number=number,
            module=MODULE,
            arguments=(),
            environment=rank_environment(threads),
            variables=child_environment(threads, base={}),
            log=log,
        )
        process = await launcher.start(program)
        reader, writer = await asyncio.open_connection(sock=process.sock)
        return cls(number, process, reader, writer, log)

    async def call(self, body: Any, arrays: Sequence[np.ndarray] = ()) -> RawAnswer:
        """Send one message and return its answer.

        Raises:
            RankDied: the process ended; the message ends with the last lines of its log.
            AgentloopError: the error that the rank reported.
        """
        try:
            self._writer.writelines(encode(body, arrays))
            await self._writer.drain()

            length = header_length(await self._reader.readexactly(HEADER_LENGTH_BYTES))
            answer, described = decode_header(await self._reader.readexactly(length))
            received = [
                np.frombuffer(await self._reader.readexactly(array_bytes(dtype, shape)), dtype=dtype).reshape(shape)
                for dtype, shape in described
            ]
        except (asyncio.IncompleteReadError, ConnectionError) as exc:
            raise await self._exit_report() from exc

        if "ok" in answer:
            return answer["ok"], received
        raise error_from_json(
            answer,
            lambda message: WorkerError(f"trainer rank {self.number} failed: {message}", f"see {self.log}"),
        )

    async def end(self) -> None:
        """Close the socket, at which the process exits; kill it after `CLOSE_TIMEOUT_S` seconds."""
        self._writer.close()
        try:
            await asyncio.wait_for(self.process.wait(), CLOSE_TIMEOUT_S)
        except TimeoutError:
            await self._killed()

    async def _killed(self) -> None:
        """Kill the process. One that is stuck in the kernel, in a driver say, is left behind."""
        self.kill()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.process.wait(), CLOSE_TIMEOUT_S)

    @property
    def address(self) -> str:
        """The address from which it is connected; empty: it is a child of this process."""
        peer = self._writer.get_extra_info("peername")
        return str(peer[0]) if isinstance(peer, tuple) else ""

    @property
    def stopped(self) -> bool:
        """Whether the process is stopped by a signal (SIGSTOP)."""
        return self.process.stopped

    def kill(self) -> None:
        self.process.kill()

    async def _exit_report(self) -> RankDied:
        try:
            code = await asyncio.wait_for(self.process.wait(), CLOSE_TIMEOUT_S)
        except TimeoutError:  # it closed its socket and hangs
            await self._killed()
            code = None
        memory = "exit code -9 usually means out of memory: lower trainer.tokens_per_micro_batch"
        tail = self.process.log_tail()
        return RankDied(
            f"trainer rank {self.number} died (exit code {code}). Last lines of {self.log}:\n{tail}",
            memory if code == -signal.SIGKILL else "the last lines above name the cause",
        )


def early_ranks(trainer: TrainerConfig) -> list[EarlyProgram]:
    """Return the programs of the ranks, to be started early."""
    environment = rank_environment(trainer.threads)
    # torch does not promise that a process may fork once CUDA libraries are loaded.
    forks = trainer.device == "cpu"
    return [EarlyProgram(MODULE, ["trainer.learner.learner"], environment, forks=forks)] * trainer.ranks


def rank_environment(threads: int) -> dict[str, str]:
    """Return the environment of a rank's process with so many intra-op threads."""
    environment = child_environment(threads)
    if sys.platform == "linux":
        # Ranks are local. A host name that resolves to another address would make gloo hang.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # The rank must import the trainer that started it. `-P` keeps the working directory, which may
    # hold another package of that name, out of its path.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, environment.get("PYTHONPATH")]))
    return environment
