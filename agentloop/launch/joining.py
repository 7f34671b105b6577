"""The connection of a process to the main process: inherited from it, or made to its listener."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Sequence

from agentloop.errors import WorkerError
from agentloop.launch.handshake import Identity, greet, keep_alive

KEY_VARIABLE = "AGENTLOOP_CONNECTION_KEY"
"""Name of the variable that holds a process's key, in hex."""

LEASE_VARIABLE = "AGENTLOOP_LEASE"
"""Name of the variable that holds, for a process that needs no connection but to end with the main
process, the words of the command line of `connection`."""

CONNECT_S = 30.0
"""Time for the connection to succeed."""

RETRY_S = 0.2

GRACE_S = 15.0
"""Time for a process to end by itself after its connection has closed: an agent worker closes its
tools."""

LEASE_GRACE_S = 1.0
"""The same for a lease, which is closed after the process was asked to end."""


def connection(description: str | None, arguments: Sequence[str] | None = None) -> socket.socket:
    """Return the connection that the command line names.

    A process that has made it ends when it closes, whatever it does at that moment. So none goes on
    beside the one that was started in its place.

    Args:
        description: of the program, for `--help`.
        arguments: the command line; None: that of this process.

    Raises:
        WorkerError: the main process refuses this one, or cannot be reached.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--fd", type=int, help="inherited socket to the main process")
    parser.add_argument("--connect", help="host:port of the main process; the key is in the environment")
    parser.add_argument("--name", default="", help="of this process")
    parser.add_argument("--epoch", type=int, default=0, help="number of this start of it")
    options = parser.parse_args(arguments)
    if options.fd is not None:
        return socket.socket(fileno=options.fd)
    if options.connect is None:
        parser.error("--fd or --connect is needed")
    return connect(options.connect, Identity(options.name, options.epoch))


def connection_words(address: str, identity: Identity) -> list[str]:
    """Return the words of the command line of a process that connects to `address`."""
    return ["--connect", address, "--name", identity.name, "--epoch", str(identity.epoch)]


def hold_lease() -> None:
    """Let this process end with the main process, if the environment names one.

    Raises:
        WorkerError: the main process refuses this one, or cannot be reached.
    """
    words = os.environ.pop(LEASE_VARIABLE, "").split()
    if words:
        _, address, _, name, _, epoch = words
        connect(address, Identity(name, int(epoch)), grace_s=LEASE_GRACE_S).detach()


def connect(address: str, identity: Identity, *, grace_s: float = GRACE_S) -> socket.socket:
    """Connect to the main process, and end with the connection.

    The key leaves the environment, which programs started by tools would inherit.

    Args:
        address: `host:port`.
        grace_s: time for this process to end by itself.

    Raises:
        WorkerError: it refuses this process, or cannot be reached.
    """
    key = bytes.fromhex(os.environ.pop(KEY_VARIABLE, ""))
    if not key:
        raise WorkerError(f"{KEY_VARIABLE} is not set", "this program is started by a run, not by hand")
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + CONNECT_S
    while True:
        try:
            sock = socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S)
            try:
                greet(sock, identity, key)
            except BaseException:
                sock.close()
                raise
            break
        except OSError as exc:
            if time.monotonic() > deadline:
                raise WorkerError(
                    f"{identity.name} cannot reach the main process at {address}: {exc}",
                    "machines of a run must reach each other on all ports",
                ) from exc
            time.sleep(RETRY_S)
    with contextlib.suppress(OSError):
        keep_alive(sock)
    threading.Thread(target=_end_with, args=(sock.fileno(), grace_s), name="connection watch", daemon=True).start()
    return sock


def _end_with(fd: int, grace_s: float) -> None:
    """End this process some time after the other end of its connection has closed."""
    poll = select.poll()
    # Not for what can be read: the program reads that. Where the system has no such event (macOS),
    # only the program's own reading notices the end.
    poll.register(fd, getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR)
    with contextlib.suppress(OSError):
        poll.poll()
    time.sleep(grace_s)
    with contextlib.suppress(OSError, ValueError):
        print("the connection to the main process has closed: this process ends", file=sys.stderr, flush=True)
    os._exit(1)
