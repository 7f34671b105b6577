"""Where weave's requests go: checked addresses, and connections that a `Deadline` can end."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from agentloop.errors import ConfigError
from agentloop.text import hide_secrets
from agentloop.trace.deadline import watch

VARIABLES = ("WF_TRACE_SERVER_URL", "WANDB_BASE_URL", "WANDB_PUBLIC_BASE_URL")
"""Variables from which weave reads addresses."""


def check_variables() -> None:
    """Check the addresses that weave reads from the environment.

    Raises:
        ConfigError: one is not an address.
    """
    for variable in VARIABLES:
        if address := os.environ.get(variable):
            check_address(variable, address)


def check_address(name: str, address: str) -> None:
    """Check an address of weave. A user and a password in it are sent in place of the API key; if
    they break the address, errors of libraries show parts of them.

    Args:
        name: names the address in the error, which does not show it.

    Raises:
        ConfigError: it is not an address.
    """
    try:
        parts = urlsplit(address)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(
            f"{name} is not an address",
            "write it as http://host:port; in a password, write a slash as %2F, ? as %3F, # as %23, @ as %40",
        )


def shown(address: str) -> str:
    """Return an address for messages and records: without user, password and query."""
    return str(hide_secrets(address.partition("?")[0].rstrip("/")))


@functools.cache
def watch_connections() -> None:
    """Let deadlines know of the connections that weave's HTTP libraries open.

    weave makes a client for each request of GraphQL, with a library of its own, and takes
    no transport for it. Connections outside a `Deadline` are as before.
    """
    for library in ("httpcore", "httpcore2"):
        try:
            module = importlib.import_module(f"{library}._backends.sync")
        except ModuleNotFoundError:
            continue
        module.SyncBackend.connect_tcp = _watched(module.SyncBackend.connect_tcp)
        module.SyncStream.start_tls = _watched(module.SyncStream.start_tls)


def _watched(connect: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that returns a stream, whose socket is shown to the deadline."""

    @functools.wraps(connect)
    def connected(*args: Any, **options: Any) -> Any:
        stream = connect(*args, **options)
        watch(stream.get_extra_info("socket"))
        return stream

    return connected
