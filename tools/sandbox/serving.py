"""The sandbox server as a process: its checks before it starts, its address, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal

import psutil
import uvicorn

from agentloop.client.open_files import raise_limit
from agentloop.web.auth import is_loopback
from agentloop.web.token import read_token
from agentloop.wire import bind, url_of
from tools.sandbox.app import create_app
from tools.sandbox.isolation.bubblewrap import Bubblewrap
from tools.sandbox.runner import check
from tools.sandbox.settings import MB, SandboxSettings

log = logging.getLogger(__name__)

BACKLOG = 2048
SHUTDOWN_S = 5

KEEP_ALIVE_S = 75
"""An idle connection lives longer than clients keep it: one that the server closes while a request
is on its way looks like a failure."""


def serve(settings: SandboxSettings) -> int:
    """Serve until the process is stopped; return the exit code.

    Raises:
        ConfigError: no program can be run in isolation here, the port is taken, or the token
            cannot be used. The message says what to change.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    raise_limit()
    token = read_token(settings.token_file) if settings.token_file is not None else None
    made = None
    if token is None and not is_loopback(settings.host):
        token = made = secrets.token_urlsafe(24)

    sandboxed = not settings.run_programs_without_a_sandbox
    sock = bind(settings.host, settings.port)
    launcher = Bubblewrap(settings, sandboxed=sandboxed)
    try:
        # SIGTERM ends as Ctrl-C does. uvicorn raises either again after a clean end.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(check(settings, launcher))
            sock.listen(BACKLOG)  # before the address is printed: who reads it may connect at once
            if not sandboxed:
                log.warning("programs run WITHOUT a sandbox: they may do whatever this user may")
            wanted = settings.max_running * settings.memory_mb * MB
            if wanted > (there := psutil.virtual_memory().total):
                log.warning(
                    "%d programs of %d MB take more than this machine has (%d MB): lower --max-running or --memory-mb, "
                    "or programs may be killed that did nothing wrong",
                    settings.max_running, settings.memory_mb, there // MB,
                )  # fmt: skip
            print(f"sandbox: {url_of(sock, settings.host)}", flush=True)
            if made is not None:
                print(f"token:   {made}", flush=True)
            config = uvicorn.Config(
                create_app(settings, launcher, token), ws="none", log_config=None, log_level="warning",
                access_log=False, timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=SHUTDOWN_S,
                server_header=False, proxy_headers=False,
            )  # fmt: skip
            uvicorn.Server(config).run(sockets=[sock])
        return 0
    finally:
        launcher.close()
