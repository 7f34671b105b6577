"""From settings to a serving process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from agentloop.config.server import ServerSettings
from agentloop.errors import ModelError
from agentloop.model_folder import CONFIG_FILE, ModelFolder
from agentloop.runtime.early import EarlyProgram, early_programs
from agentloop.runtime.event_loop import uncollected
from agentloop.wire import bind, url_of
from rollout_server.api.app import build_app
from rollout_server.api.connection import limited
from rollout_server.engines import engine_factory
from rollout_server.engines.base import EngineInfo, FolderWeights
from rollout_server.placeholders import placeholders_of
from rollout_server.process import die_with_parent, write_ready_file
from rollout_server.replica.local import LocalReplica
from rollout_server.router.fleet import Fleet
from rollout_server.router.router import Router
from rollout_server.settings import check_model

if TYPE_CHECKING:
    from rollout_server.replica.starting.base import Source

log = logging.getLogger("rollout_server")

FAILURE_CHECK_S = 0.25


def serve(settings: ServerSettings) -> int:
    """Serve until the process is stopped; return the exit code.

    Raises:
        UserError: the port, the model, a token or the engine's name is wrong.
        ServerStartError: a replica did not start.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if settings.parent_pid is not None:
        die_with_parent(settings.parent_pid)

    # Cheap checks first: report a missing token, a wrong path or a taken port before the model is
    # loaded.
    settings.check_tokens()
    check_model(settings)
    sock = bind(settings.host, settings.port)

    with early_programs(_early_replicas(settings)):
        return _serve(settings, sock)


def _serve(settings: ServerSettings, sock: socket.socket) -> int:
    with uncollected():
        router, fleet = build_router(settings)
        app = build_app(router, fleet, settings=settings)
    config = uvicorn.Config(
        app, http=limited(settings), ws="none", lifespan="off", log_config=None, log_level="warning", access_log=False,
        backlog=4096, timeout_keep_alive=75, timeout_graceful_shutdown=max(1, round(settings.drain_s)),
        server_header=False, date_header=False, proxy_headers=False,
    )  # fmt: skip
    server = _Server(config, settings, router, fleet)
    server.run(sockets=[sock])

    if server.start_error is not None:
        raise server.start_error
    if router.failure:
        log.error("ended because the engine failed: %s", router.failure)
        return 1
    return 0


def build_router(settings: ServerSettings) -> tuple[Router, Fleet | None]:
    """Build a router over one engine in this process, or over a fleet of other processes."""
    in_process = settings.replicas == 1 and settings.engine != "sglang" and not settings.replica_urls
    replicas = len(settings.replica_urls) or settings.replicas
    limit = settings.most_in_flight(replicas)

    if in_process:
        engine = engine_factory(settings.engine)(settings)
        return Router([LocalReplica(engine)], max_in_flight=limit), None

    if settings.engine != "sglang":
        engine_factory(settings.engine)  # report an unknown name here, not in a replica's log
    info = engine_info(settings)
    router = Router(
        info=info,
        version=settings.weight_version,
        source=None if settings.weights is None else FolderWeights(settings.weights),
        max_in_flight=limit,
        start_timeout_s=settings.start_timeout_s,
    )

    log_dir = settings.log_dir or Path(tempfile.mkdtemp(prefix="agentloop-serve-"))
    make = _source_maker(settings, info, log_dir)
    log.info("starting %d replicas; their logs are in %s", replicas, log_dir)
    fleet = Fleet(
        router,
        [make(number) for number in range(replicas)],
        probe_every_s=settings.probe_every_s,
        probe_timeout_s=settings.probe_timeout_s,
        make_source=None if settings.replica_urls else make,
    )
    return router, fleet


def _early_replicas(settings: ServerSettings) -> Sequence[EarlyProgram]:
    """Return the replicas that begin to import at once."""
    if settings.replicas == 1:
        return ()
    from rollout_server.replica.starting.torch import early_replicas  # with an HTTP client, as in `_sources`

    return early_replicas(settings)


def _source_maker(settings: ServerSettings, info: EngineInfo, log_dir: Path) -> Callable[[int], Source]:
    """Return a function that makes the source of a fleet's replica, by its number."""
    # Here, because a server with its engine in this process needs no HTTP client.
    from rollout_server.replica.starting.sglang import SglangSource
    from rollout_server.replica.starting.torch import TorchSource
    from rollout_server.replica.starting.url import UrlSource

    if urls := settings.replica_urls:
        return lambda number: UrlSource(settings, urls[number], info, settings.replica_token)
    if settings.engine == "sglang":
        return lambda number: SglangSource(settings, number, info, log_dir)
    token = secrets.token_urlsafe(32)
    return lambda number: TorchSource(settings, number, info, token, log_dir)


def engine_info(settings: ServerSettings) -> EngineInfo:
    """Read what the checks of requests need (vocabulary, context, vision tower), without loading
    the model.

    Raises:
        ModelError: config.json is missing or lacks a value, or `context_length` exceeds the
            model's.
    """
    model, context_length = settings.model, settings.context_length
    folder = ModelFolder.resolve(model, [CONFIG_FILE], key="--model")
    vocab, longest = folder.vocab_size, folder.context_length or context_length
    if not vocab or not longest:
        raise ModelError(
            f"the config.json of {model} has no vocab_size or no max_position_embeddings", "give --context-length"
        )
    if context_length is not None and context_length > longest:
        raise ModelError(
            f"--context-length {context_length} exceeds the model's maximum of {longest}", f"give at most {longest}"
        )
    return EngineInfo(
        settings.engine,
        model,
        context_length or longest,
        vocab,
        images=folder.takes_images,
        model_type=folder.model_type,
        placeholders=placeholders_of(folder),
    )


class _Server(uvicorn.Server):
    """uvicorn's server, extended: it writes the ready file once it serves, and ends when the engine
    has failed."""

    def __init__(self, config: uvicorn.Config, settings: ServerSettings, router: Router, fleet: Fleet | None) -> None:
        super().__init__(config)
        self.start_error: Exception | None = None
        self._settings = settings
        self._router = router
        self._fleet = fleet
        self._watcher: asyncio.Task[None] | None = None

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        if self._fleet is not None and not await self._start_fleet(self._fleet):
            self.should_exit = True
            return

        await super().startup(list(sockets or []))
        if sockets and self.started:
            url = url_of(sockets[0], self._settings.host)
            if self._settings.ready_file is not None:
                write_ready_file(self._settings.ready_file, url)
            log.info("serving %s at %s, version %s", self._settings.model, url, self._router.weights.version)
            self._watcher = asyncio.create_task(self._watch(), name="engine watch")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await super().shutdown(sockets)
        # Close the replicas after the last answers.
        if self._fleet is not None:
            await self._fleet.close()
        await self._router.close()

    async def _start_fleet(self, fleet: Fleet) -> bool:
        """Start the replicas; False if that failed, or if the server was stopped meanwhile."""
        starting = asyncio.create_task(fleet.start())
        while not starting.done():
            await asyncio.wait([starting], timeout=FAILURE_CHECK_S)
            if self.should_exit:
                starting.cancel()
        try:
            await starting
        except asyncio.CancelledError:
            return False
        except Exception as exc:  # noqa: BLE001  # raised again in `serve`
            self.start_error = exc
            return False
        return True

    async def _watch(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            while not self._router.failure:  # noqa: ASYNC110  # set by another thread, and rarely needed
                await asyncio.sleep(FAILURE_CHECK_S)
            self.should_exit = True
