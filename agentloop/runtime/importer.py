"""A process that imports modules, and then becomes a program or forks programs off.

Usage: `python -P -m agentloop.runtime.importer FD PARENT PADDING`, started by
`agentloop.runtime.early`. It takes messages from the socket FD, one after the other: modules to
import, modules to import while no message waits, programs to fork off, a program to become. It ends
with its parent and when the socket ends.

A forked program is a child of the parent, not of this process: this one forks twice, and the
kernel gives orphans to the nearest subreaper above, which the parent is meanwhile. So the parent
waits for it, and the kernel ends it with the parent, as with any child. It is forked only while
this process has a single thread: others would not exist in the program, but their locks would.

PADDING is room for the command line of the program, which `ps` shows instead of this one's.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import time
from typing import Any

from agentloop.runtime.scan import remember_scans

SIZE_BYTES = 4
"""Of the length in front of each message, and of a process id in an answer."""

PR_SET_PDEATHSIG = 1
ADOPTION_CHECK_S = 0.0005


def main() -> None:
    """Import and fork until a program is to be run in this process; run it."""
    control, parent = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    _tie(parent)
    remember_scans()
    gc.disable()  # what is imported stays: see `event_loop.uncollected`
    order = _next_program(control, parent)
    control.close()
    if order is None:
        os._exit(0)  # nothing to clean up, and the modules of torch take a while

    gc.freeze()
    gc.enable()
    _take(order)
    runpy.run_module(order["module"], run_name="__main__", alter_sys=True)


def _next_program(control: socket.socket, parent: int) -> dict[str, Any] | None:
    """Serve messages until this process, or one forked from it, has a program to run."""
    meanwhile: list[str] = []
    while True:
        while meanwhile and not select.select([control], [], [], 0)[0]:
            _import(meanwhile.pop(0))
        if (message := _read_message(control)) is None:
            return None
        for name in message.get("import", ()):
            _import(name)
        meanwhile += message.get("meanwhile", ())

        order: dict[str, Any] | None = message.get("program")
        if order is None:
            continue
        meanwhile.clear()  # the others follow at once
        if order["passes_socket"]:
            order["fd"] = socket.recv_fds(control, 1, 1)[1][0]
        if not order["fork"]:
            with contextlib.suppress(OSError):  # the parent has not waited for it
                control.sendall(os.getpid().to_bytes(SIZE_BYTES))
            return order
        if _fork(control, parent):
            return order
        if order["passes_socket"]:
            os.close(order["fd"])


def _import(name: str) -> None:
    # What cannot be imported is reported by the program, in its log.
    with contextlib.suppress(Exception):
        importlib.import_module(name)


def _fork(control: socket.socket, parent: int) -> bool:
    """Fork a child of `parent`, and tell the parent its process id, 0 if that failed.

    Returns:
        True in the child.
    """
    pid = 0
    if len(os.listdir("/proc/self/task")) == 1:  # noqa: PTH208  # as small as can be
        gc.freeze()
        ends, starts = os.pipe()
        middle = os.fork()
        if middle == 0:
            middle = os.getpid()
            if os.fork():
                os._exit(0)

            os.close(ends)
            os.setsid()  # first: as soon as the process id is known, its group may be killed
            os.write(starts, os.getpid().to_bytes(SIZE_BYTES))
            os.close(starts)
            while os.getppid() == middle:
                time.sleep(ADOPTION_CHECK_S)
            _tie(parent)
            _draw_seeds()
            return True
        os.close(starts)
        os.waitpid(middle, 0)
        pid = int.from_bytes(os.read(ends, SIZE_BYTES))
        os.close(ends)
    control.sendall(pid.to_bytes(SIZE_BYTES))
    return False


def _tie(parent: int) -> None:
    """End this process with `parent`, whose child it must be."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _draw_seeds() -> None:
    """Give this process random numbers of its own; Python's `random` does that by itself."""
    if (numbers := sys.modules.get("numpy.random")) is not None:
        numbers.seed()


def _take(order: dict[str, Any]) -> None:
    """Give this process the log, environment and arguments of its program."""
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ.clear()
    os.environ.update(order["environment"])
    arguments = [word.replace("{fd}", str(order.get("fd"))) for word in order["arguments"]]
    sys.argv = [order["module"], *arguments]
    _show([sys.executable, "-P", "-m", order["module"], *arguments])


def _show(command: list[str]) -> None:
    """Let `ps` show this command line, as far as there is room, instead of the importer's."""
    try:
        with open("/proc/self/stat", "rb") as file:  # noqa: PTH123  # as small as can be
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return
    start, end = int(fields[45]), int(fields[46])
    words = b"\0".join(word.encode(errors="surrogateescape") for word in command)[: end - start - 1]
    ctypes.memmove(start, words.ljust(end - start, b"\0"), end - start)


def _read_message(control: socket.socket) -> dict[str, Any] | None:
    size = _read(control, SIZE_BYTES)
    text = _read(control, int.from_bytes(size)) if size else b""
    message: dict[str, Any] | None = json.loads(text) if text else None
    return message


def _read(control: socket.socket, size: int) -> bytes:
    """Read exactly `size` bytes, and none of what follows; empty at the end of the stream."""
    data = b""
    while len(data) < size:
        chunk = control.recv(size - len(data))
        if not chunk:
            return b""
        data += chunk
    return data


if __name__ == "__main__":
    main()
