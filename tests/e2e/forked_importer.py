"""A program for `ForkedPrograms`: `agentloop` in a process that need not import what its commands use.

The commands start `agentloop.runtime.importer`, which imports torch and becomes the ranks and the server. Here
that process is forked, too, and finds everything imported. All else is as in a command that a user starts; that
a start works is for the tests of runs that begin as a user's do: `finished`, and all in the background.
"""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedTokenizerFast  # noqa: F401

from agentloop.runtime import early, importer
from agentloop.runtime.variables import child_environment


class ForkedImporter(early.ForkedProcess):
    """What `Importer` needs of `subprocess.Popen`."""

    def wait(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("importer", timeout)
            time.sleep(0.001)


def main() -> None:
    """Run `agentloop`; fork off the process that becomes its importer first."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        become_importer(theirs)
        return
    theirs.close()
    waiting = [pid]

    def start(command: Sequence[str], *, env: Mapping[str, str], pass_fds: Sequence[int], **options: Any) -> Any:
        if not waiting or not fits(env):
            return subprocess.Popen(command, env=env, pass_fds=pass_fds, **options)
        order = {"environment": dict(env), "arguments": command[command.index(importer.__name__) :]}
        socket.send_fds(ours, [json.dumps(order).encode()], pass_fds)
        ours.close()
        return ForkedImporter(waiting.pop())

    early.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": start})  # type: ignore[assignment]
    runpy.run_module("agentloop.commands.main", run_name="__main__", alter_sys=True)


def fits(environment: Mapping[str, str]) -> bool:
    """Whether a process that was forked from here is as one that was started with `environment`."""
    here = child_environment(1)
    names = [name for name in early.AT_EXEC if name != "PYTHONPATH"]
    return all(environment.get(name) == here.get(name) for name in names)


def become_importer(control: socket.socket) -> None:
    """Wait until the command starts its importer, and be it; end without one when the command ends."""
    order, sockets, _, _ = socket.recv_fds(control, 2**20, 1)
    if not sockets:
        os._exit(0)
    control.close()
    given = json.loads(order)
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.close(nothing)
    os.environ.clear()
    os.environ.update(given["environment"])
    _, _, *rest = given["arguments"]
    sys.argv = [importer.__name__, str(sockets[0]), *rest]
    importer.main()


if __name__ == "__main__":
    main()
