"""The sender process, from the inside.

It reads requests and writes answers, one line of JSON each: first `{"settings", "run"}`, then
`{"images": {name: base64}, "episodes": [[record, ...]]}`. An answer is `{}` once the receiver has
confirmed the episodes, or `{"error", "hint", "final", "config"}`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from agentloop.errors import ConfigError, ExportError
from agentloop.trace.exporting import ExportRun, TracedEpisode
from agentloop.trace.sender.wire import line, read_line, unpacked

MEMORY_BYTES = 4 * 2**30
"""Address space of the process: an answer without end fails, and takes no memory from the run."""

PR_SET_PDEATHSIG = 1


class Sender(Protocol):
    """Sends episodes, and returns once the receiver has confirmed them."""

    def send(self, episodes: Sequence[TracedEpisode], images: Mapping[str, str]) -> None:
        """Send episodes.

        Args:
            images: base64 by the name with which messages refer to them; of this request and later
                ones.

        Raises:
            ConfigError: the environment lacks something.
            ExportError: as `SpanExporter.export`.
        """
        ...


def main(parent: int, module: str) -> None:
    """Serve the process `parent`, which started this one, with the sender of a module."""
    _tie(parent)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(OSError, ValueError):  # where the limit cannot be set, the run has one
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES if most < 0 else min(MEMORY_BYTES, most), most))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keep what libraries print out of the pipe of answers
    _serve(module, sys.stdin.buffer, answers)
    os._exit(0)  # threads of libraries would be waited for


def _serve(module: str, requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests until the pipe is closed."""
    if not (text := requests.readline()):
        return
    first = read_line(text)
    run = ExportRun(**{**first["run"], "folder": Path(first["run"]["folder"])})
    sender: Sender = importlib.import_module(module).sender(first["settings"], run)
    while text := requests.readline():
        request = read_line(text)
        answers.write(line(_answer(sender, run, request)))
        answers.flush()


def _answer(sender: Sender, run: ExportRun, request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        sender.send([unpacked(run, episode) for episode in request["episodes"]], request["images"])
    except ConfigError as exc:
        return {"error": exc.message, "hint": exc.hint, "final": False, "config": True}
    except ExportError as exc:
        return {"error": exc.message, "hint": exc.hint, "final": exc.final, "config": False}
    except MemoryError:
        raise  # the next process has all of it again
    except Exception as exc:  # noqa: BLE001  # one episode that cannot be converted does not stop the others
        return {"error": f"{type(exc).__name__}: {exc}", "hint": None, "final": True, "config": False}
    return {}


def _tie(parent: int) -> None:
    """End this process with `parent`: while it waits for a server, it does not see the end of its
    input."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
