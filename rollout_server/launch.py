"""From settings to a serving process."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence

import uvicorn

from rollout_server.app import build_app
from rollout_server.engines import engine_factory
from rollout_server.process import bind, die_with_parent, url_of, write_ready_file
from rollout_server.replica import LocalReplica
from rollout_server.router import Router
from rollout_server.settings import ServerSettings, check_model

log = logging.getLogger("rollout_server")

FAILURE_CHECK_S = 0.25
SHUTDOWN_S = 3


def serve(settings: ServerSettings) -> int:
    """Serve until told to stop; returns the exit code.

    Raises:
        UserError: the port, the model or the engine's name is wrong.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if settings.parent_pid is not None:
        die_with_parent(settings.parent_pid)
    # First of all: a taken port and a wrong path are known before seconds go into loading.
    check_model(settings.model)
    sock = bind(settings.host, settings.port)
    router = Router([LocalReplica(engine_factory(settings.engine)(settings))])
    app = build_app(router, weights_roots=settings.weights_roots, token=settings.token)
    config = uvicorn.Config(
        app, http="httptools", ws="none", lifespan="off", log_config=None, log_level="warning", access_log=False,
        backlog=4096, timeout_keep_alive=75, timeout_graceful_shutdown=SHUTDOWN_S, server_header=False,
        date_header=False,
    )  # fmt: skip
    server = _Server(config, settings, router)
    server.run(sockets=[sock])
    if router.failure:
        log.error("ended because the engine failed: %s", router.failure)
        return 1
    return 0


class _Server(uvicorn.Server):
    """uvicorn's server, which says when it serves and ends when the engine has failed for good."""

    def __init__(self, config: uvicorn.Config, settings: ServerSettings, router: Router) -> None:
        super().__init__(config)
        self._settings = settings
        self._router = router

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        await super().startup(list(sockets or []))
        if sockets and self.started:
            url = url_of(sockets[0], self._settings.host)
            if self._settings.ready_file is not None:
                write_ready_file(self._settings.ready_file, url)
            log.info("serving %s at %s, version %s", self._settings.model, url, self._router.weight_version)
            self._watcher = asyncio.create_task(self._watch(), name="engine watch")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._watcher.cancel()
        await super().shutdown(sockets)
        await self._router.close()

    async def _watch(self) -> None:
        while not self._router.failure:  # noqa: ASYNC110  # set by another thread, looked at rarely
            await asyncio.sleep(FAILURE_CHECK_S)
        self.should_exit = True
