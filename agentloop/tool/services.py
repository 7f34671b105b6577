"""Whether the servers behind tools can be reached, before a run needs them."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from agentloop.tool.base import Tool

TIMEOUT_S = 3.0


def unreachable(tools: Iterable[Tool]) -> list[str]:
    """Try to connect to the server of each tool; return a sentence for each one that does not
    answer. Nothing is sent."""
    found: dict[str, str] = {}
    names: dict[str, list[str]] = {}
    for tool in tools:
        if tool.service is None:
            continue
        names.setdefault(tool.service, []).append(tool.name)
        if tool.service not in found:
            found[tool.service] = _failure(tool.service)
    return [
        f"{', '.join(names[url])}: {url} cannot be reached ({failure}): start that server before the run, whose "
        "episodes wait for it"
        for url, failure in found.items()
        if failure
    ]


def _failure(url: str) -> str:
    """Return why the server of a URL cannot be connected to; empty if it can."""
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        with socket.create_connection((parts.hostname or "", port), TIMEOUT_S):
            return ""
    except (OSError, ValueError) as exc:
        return getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
