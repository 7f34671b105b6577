"""Start Python programs before it is known what they shall do: they import their modules meanwhile.

Importing torch and transformers takes seconds. `early_programs` starts programs that need them when
a command begins; each imports what it is told to and waits. What it shall run is decided later:
`begin_early` sends arguments, environment and log to a waiting program of that name. Without one,
or when it has ended, programs are started as usual (agentloop/runtime/child.py).

This file is also the program: `python -m agentloop.runtime.early FD IMPORTS MODULE`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agentloop.runtime.event_loop import uncollected

SIZE_BYTES = 4
AT_EXEC = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "GLIBC_TUNABLES", "LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH")
"""Variables that are read when a program starts or imports: an early program must have had them."""

_waiting: list[_Early] = []


@dataclass(frozen=True)
class EarlyProgram:
    """A module to run with `python -m`, and what it imports meanwhile.

    Attributes:
        environment: the whole environment.
    """

    module: str
    imports: Sequence[str]
    environment: Mapping[str, str]


@dataclass
class _Early:
    program: EarlyProgram
    process: subprocess.Popen[bytes]
    orders: socket.socket
    fd: int


@contextlib.contextmanager
def early_programs(programs: Sequence[EarlyProgram]) -> Iterator[None]:
    """Start programs that wait for `begin_early`. Those that it has not taken are killed at the end
    of the block."""
    from agentloop.runtime.child import tied

    started: list[_Early] = []
    try:
        for program in programs:
            ours, theirs = socket.socketpair()
            with theirs:
                arguments = [str(theirs.fileno()), ",".join(program.imports), program.module]
                process = subprocess.Popen(
                    tied([sys.executable, "-P", "-m", "agentloop.runtime.early", *arguments]),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=dict(program.environment),
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
                started.append(_Early(program, process, ours, theirs.fileno()))
        _waiting.extend(started)
        yield
    finally:
        for early in started:
            if early in _waiting:
                _waiting.remove(early)
                early.process.kill()
                early.process.wait()
                early.orders.close()


def begin_early(
    module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path
) -> tuple[subprocess.Popen[bytes], socket.socket] | None:
    """Let a waiting program run `module`; None if there is none that fits.

    Args:
        arguments: of the module. `{fd}` becomes the number of the program's end of the socket.
        environment: the whole environment.
        log: takes what the program prints from now on; appended to.

    Returns:
        The process, and our end of a socket to it.
    """
    for early in list(_waiting):
        had = early.program.environment
        if early.program.module != module or any(had.get(key) != environment.get(key) for key in AT_EXEC):
            continue

        _waiting.remove(early)
        if early.process.poll() is not None:
            early.orders.close()
            continue
        words = [word.replace("{fd}", str(early.fd)) for word in arguments]
        order = json.dumps({"arguments": words, "environment": dict(environment), "log": str(log.absolute())}).encode()
        try:
            early.orders.sendall(len(order).to_bytes(SIZE_BYTES) + order)
        except OSError:  # it has ended
            early.process.kill()
            early.process.wait()
            early.orders.close()
            continue
        return early.process, early.orders
    return None


def main() -> None:
    """Import, wait for the order, and run the module in this process."""
    fd, imports, module = int(sys.argv[1]), sys.argv[2].split(","), sys.argv[3]
    with uncollected():
        for name in imports:
            # What cannot be imported is reported by the module itself, in its log.
            with contextlib.suppress(Exception):
                importlib.import_module(name)

    orders = socket.socket(fileno=fd)
    size = _read(orders, SIZE_BYTES)
    text = _read(orders, int.from_bytes(size)) if size else b""
    if not text:  # the command ended
        return
    order = json.loads(text)

    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.argv = [module, *order["arguments"]]
    orders.detach() if str(fd) in order["arguments"] else orders.close()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _read(orders: socket.socket, size: int) -> bytes:
    """Read exactly `size` bytes, and none of what follows; empty at the end of the stream."""
    data = b""
    while len(data) < size:
        chunk = orders.recv(size - len(data))
        if not chunk:
            return b""
        data += chunk
    return data


if __name__ == "__main__":
    main()
