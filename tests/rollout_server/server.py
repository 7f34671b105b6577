"""A rollout server in a process of its own, and small applications behind its HTTP layer."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import uvicorn

from agentloop.config.server import ServerSettings
from agentloop.wire import bind
from rollout_server.api.asgi import read_body, send_json
from rollout_server.api.connection import limited
from tests import forked

PROGRAM = ("rollout_server",)


class Server:
    """`python -m rollout_server` with options, or another program that starts it."""

    def __init__(self, folder: Path, *options: str, program: Sequence[str] = PROGRAM) -> None:
        self.log = folder / "server.log"
        self._ready = folder / "ready.json"
        module, *words = program
        files = ["--ready-file", str(self._ready), "--log-dir", str(folder / "logs")]
        self.process = forked.start(module, [*words, *files, *options], self.log)

    @property
    def url(self) -> str:
        while not self._ready.exists():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        return str(json.loads(self._ready.read_text())["url"])

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> None:
        """Ask it to end, and wait."""
        self.process.terminate()
        self.process.wait(30)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)


async def size(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the size of the body."""
    await send_json(send, b"%d" % len(await read_body(scope, receive)))


@contextlib.asynccontextmanager
async def serving(app: Any = size, **options: Any) -> AsyncIterator[int]:
    """The port of a server."""
    settings = ServerSettings(model="", **options)
    config = uvicorn.Config(app, http=limited(settings), ws="none", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    sock = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup([sock])
    try:
        yield port
    finally:
        server.should_exit = True
        await server.shutdown([sock])
