"""The trace server as a process: its token, its port, and its end."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn

from agentloop.viewer.app import create_app
from agentloop.web.auth import is_loopback
from agentloop.web.token import read_token
from agentloop.wire import bind, url_of

SHUTDOWN_S = 2
"""Open requests (a page that waits for events) get this long after Ctrl-C."""

BACKLOG = 2048

ELSEWHERE = {"0.0.0.0": (socket.AF_INET, "192.0.2.1"), "::": (socket.AF_INET6, "2001:db8::1")}  # noqa: S104
"""Hosts that mean every address of a machine -> an address of documentation of the same family."""

NICENESS = 10
"""Of the process: a run on the same cores goes first, and the viewer still answers."""


def serve(
    runs: Sequence[Path],
    *,
    host: str,
    port: int,
    token_file: Path | None,
    data: Path | None,
    say: Callable[[str], None],
) -> None:
    """Serve until the process is stopped.

    Args:
        token_file: holds the token; None: none on the loopback address, a new one elsewhere.
        say: prints a line for the user.

    Raises:
        ConfigError: the port is taken, the host is unknown, or the token cannot be used.
    """
    token = read_token(token_file) if token_file is not None else None
    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(24)
    sock = bind(host, port)
    sock.listen(BACKLOG)  # before the address is printed: who reads it may connect at once
    url = url_for_others(sock, host)
    say(f"viewer: {url}/" + (f"?token={token}" if token is not None and token_file is None else ""))
    say(f"weave:  export WANDB_BASE_URL={url} WF_TRACE_SERVER_URL={url} WANDB_API_KEY={_key(token, token_file)}")
    say(f"OTLP:   {url}/v1/traces" + (f" with the header {_bearer(token, token_file)}" if token is not None else ""))
    for folder in runs:
        if not folder.exists():
            say(f"{folder} does not exist yet: waiting for it")
    say("Ctrl-C ends it.")
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    config = uvicorn.Config(
        create_app(runs, data=data, token=token), ws="none", log_config=None, log_level="warning", access_log=False,
        timeout_graceful_shutdown=SHUTDOWN_S, server_header=False, proxy_headers=False,
    )  # fmt: skip
    server = _Server(config)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after a clean end
        server.run(sockets=[sock])


class _Server(uvicorn.Server):
    """uvicorn's server, which does not report that pages which wait for events are cut off at the
    end."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


def url_for_others(sock: socket.socket, host: str) -> str:
    """Return the URL under which other machines reach the socket, as far as this one knows: with
    its address on the way out, else its name, where it listens on all of them. Sends nothing."""
    if host in ELSEWHERE:
        family, other = ELSEWHERE[host]
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as way:
                way.connect((other, 9))
                host = str(way.getsockname()[0])
        except OSError:
            host = socket.gethostname()
    return url_of(sock, host)


def _bearer(token: str, token_file: Path | None) -> str:
    """Return the header that a sender of spans needs; a token of a file is not shown."""
    return f"authorization: Bearer {token if token_file is None else f'TOKEN, the content of {token_file}'}"


def _key(token: str | None, token_file: Path | None) -> str:
    if token is None:
        return "local"
    return token if token_file is None else f"$(cat {token_file})"
