"""A launcher whose processes connect to this one, as those of a cluster do, though they are its children."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncIterator

from agentloop.errors import WorkerError
from agentloop.launch.base import Launched, Program
from agentloop.launch.joining import KEY_VARIABLE, connection_words
from agentloop.launch.listener import Listener, connected
from agentloop.launch.local import LocalLauncher, LocalProcess
from agentloop.runtime.child import Child, spawn
from agentloop.runtime.early import ROOT

CONNECT_S = 120.0


class ConnectingLauncher:
    """Attributes: as `Launcher`, and `listener`."""

    local = False
    one_machine = True
    host: str | None = None

    def __init__(self, listener: Listener) -> None:
        self.listener = listener

    async def start(self, program: Program) -> Launched:
        expected = self.listener.expect(program.name)
        words = connection_words(f"{self.listener.host}:{self.listener.port}", expected.identity)
        variables = {"PYTHONPATH": ROOT, KEY_VARIABLE: expected.key.hex()}
        with program.log.open("ab") as output:
            process = await spawn(
                [sys.executable, "-P", "-m", program.module, *program.arguments, *words],
                environment={**program.environment, **program.variables, **variables},
                stdout=output,
                stderr=output,
            )
        sock = await connected(expected, process.wait(), CONNECT_S)
        if sock is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            raise WorkerError(f"{program.name} did not connect:\n{program.log.read_text()}")
        return LocalProcess(process, sock, program.log, 0)

    async def start_server(self, title: str, program: Program) -> Child:
        return await LocalLauncher().start_server(title, program)


@contextlib.asynccontextmanager
async def connecting() -> AsyncIterator[ConnectingLauncher]:
    """Yield a launcher, and close its port at the end."""
    listener = Listener.open()
    try:
        yield ConnectingLauncher(listener)
    finally:
        await listener.close()
