"""The server as a process: its port, its parent, its ready file."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import sys
import threading
import time
from pathlib import Path

from agentloop.errors import ConfigError
from agentloop.runtime import child

log = logging.getLogger(__name__)

PARENT_CHECK_S = 0.5


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, taken before a model is loaded so that a taken port is known at once.

    Raises:
        ConfigError: naming the port and the ways out.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as exc:
        sock.close()
        if exc.errno == errno.EADDRINUSE:
            fix = "stop what listens there, give another --port, or 0 for a free one"
            raise ConfigError(f"port {port} on {host} is taken", fix) from exc
        reason = f"port {port} on {host} cannot be bound: {exc.strerror or exc}"
        raise ConfigError(reason, "give another --host or --port") from exc
    return sock


def url_of(sock: socket.socket, host: str) -> str:
    """The URL under which the socket is reached from this machine."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # compared, not bound
    return f"http://{f'[{reachable}]' if ':' in reachable else reachable}:{sock.getsockname()[1]}"


def write_ready_file(path: Path, url: str) -> None:
    """Say that the server serves; whoever sees the file sees all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps({"url": url, "pid": os.getpid()}))
    draft.replace(path)


def die_with_parent(parent: int) -> None:
    """End this process when process `parent` is gone, however it went.

    The kernel's signal is immediate; the thread is for systems without it and for a parent that is no direct one. A
    thread and not a task: it also works while a model loads.
    """
    if sys.platform == "linux" and os.getppid() == parent:
        child.die_with_parent()

    def watch() -> None:
        while _alive(parent):
            time.sleep(PARENT_CHECK_S)
        log.error("process %d, which this server belongs to, is gone", parent)
        os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    # A parent that was killed and is not waited for by anybody would still answer the signal.
    return _state(pid) != "Z"


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
