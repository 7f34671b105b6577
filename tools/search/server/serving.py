"""The retrieval server as a process."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from pathlib import Path

import uvicorn

from agentloop.web.auth import is_loopback
from agentloop.web.token import read_token
from agentloop.wire import bind, url_of
from tools.search.index.folder import Opened
from tools.search.server.app import create_app
from tools.search.server.service import Retrieval

BACKLOG = 4096
SHUTDOWN_S = 5


def serve(
    open_index: Callable[[], Opened],
    *,
    host: str,
    port: int,
    token_file: Path | None,
    topk: int,
    threads: int,
    largest_batch: int,
    cache_queries: int,
    cache_bytes: int,
    say: Callable[[str], None],
) -> None:
    """Serve an index until the process is stopped.

    Args:
        open_index: opens it; called when the port is bound, since it may take minutes.
        token_file: holds the token; None: none on the loopback address, a new one elsewhere.
        say: prints a line for the user.

    Raises:
        UserError: the port is taken, the token cannot be used, or the index cannot be opened.
    """
    token = read_token(token_file) if token_file is not None else None
    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(24)
        say(f"token: {token}")
    sock = bind(host, port)
    opened = open_index()
    retrieval = Retrieval(
        opened,
        threads=threads,
        largest_batch=largest_batch,
        cache_queries=cache_queries,
        cache_bytes=cache_bytes,
    )
    sock.listen(BACKLOG)  # before the address is printed: who reads it may connect at once
    say(f"{opened.index.passages:,} passages ({opened.kind}) at {url_of(sock, host)}/retrieve")
    config = uvicorn.Config(
        create_app(retrieval, token=token, topk=topk), ws="none", log_config=None, log_level="warning",
        access_log=False, backlog=BACKLOG, timeout_keep_alive=75, timeout_graceful_shutdown=SHUTDOWN_S,
        server_header=False, date_header=False, proxy_headers=False,
    )  # fmt: skip
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after a clean end
        uvicorn.Server(config).run(sockets=[sock])
