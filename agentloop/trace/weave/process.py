"""The process that talks to weave: weave's client takes about 1 ms of CPU a call, and 2 s to
import, which would hold up the agent loops of a run in whose process it worked.

`main` reads requests and writes answers, one line of JSON each: first `{"entity", "project",
"model"}`, then `{"images": {key: base64}, "episodes": [[call, ...]]}`.
An answer is `{}` once weave's server has confirmed the calls, or `{"error", "hint", "final",
"config"}`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import IO, Any

from agentloop.errors import ConfigError, ExportError
from agentloop.trace.weave.calls import EpisodeCall
from agentloop.trace.weave.client import Client
from agentloop.trace.weave.images import ReceivedImages

NICENESS = 10
"""The process yields to the run: sending may wait."""

LOG = "logs/weave.log"
"""Messages of weave's client, in the run directory."""

CLOSE_S = 2.0

MEMORY_BYTES = 4 * 2**30
"""Address space of the process: an answer without end fails, and takes no memory from the run."""

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables of libraries that otherwise reserve memory for each core."""

PR_SET_PDEATHSIG = 1


class WeaveProcess:
    """The process, from the outside. It ends when this one does.

    Args:
        folder: the run directory; messages of weave's client go to a file in it.

    Raises:
        ExportError: it cannot be started.
    """

    def __init__(self, entity: str | None, project: str, model: str, folder: Path) -> None:
        log = folder / LOG
        command = [sys.executable, "-c", f"from agentloop.trace.weave.process import main; main({os.getpid()})"]
        variables = dict.fromkeys(THREADS, "1") | dict(os.environ)
        with contextlib.ExitStack() as stack:
            errors: IO[bytes] | int = stack.enter_context(log.open("ab")) if log.parent.is_dir() else DEVNULL
            try:
                # Of its own session: Ctrl-C ends the run, which then sends what it still has.
                self._process = Popen(
                    command, stdin=PIPE, stdout=PIPE, stderr=errors, start_new_session=True, env=variables
                )
            except OSError as exc:
                raise ExportError(f"weave: its process cannot be started: {exc}") from exc
        self._first = {"entity": entity, "project": project, "model": model}

    def send(self, episodes: Sequence[Sequence[EpisodeCall]], images: dict[str, str]) -> None:
        """Send calls, and wait for the answer of weave's server.

        Raises:
            ConfigError: the environment has no key.
            ExportError: not all of them arrived, or the process ended.
        """
        request = {"images": images, "episodes": [[asdict(call) for call in calls] for calls in episodes]}
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(b"".join(json.dumps(line).encode() + b"\n" for line in (self._first, request)))
            stdin.flush()
            answer = json.loads(stdout.readline())
        except (OSError, ValueError) as exc:
            raise ExportError(f"weave: its process ended{_status(self._process)}", f"see {LOG}") from exc
        if answer.get("config"):
            raise ConfigError(answer["error"], answer["hint"])
        if "error" in answer:
            raise ExportError(answer["error"], answer["hint"], final=answer["final"])

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def close(self) -> None:
        """End it; a request that runs fails."""
        self._process.kill()
        self._process.wait(CLOSE_S)
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()


def _status(process: Popen[bytes]) -> str:
    code = process.poll()
    return "" if code is None else f" with status {code}"


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests until there are no more."""
    client: Client | None = None
    images = ReceivedImages()
    while len(lines := [requests.readline(), requests.readline()]) == 2 and lines[1]:
        first, request = (json.loads(line) for line in lines)
        images.add(request["images"])
        answer: dict[str, Any] = {}
        try:
            client = client or Client(first["entity"], first["project"], first["model"])
            client.send([[_call(call, images) for call in calls] for calls in request["episodes"]])
        except ConfigError as exc:
            answer = {"error": exc.message, "hint": exc.hint, "final": False, "config": True}
        except ExportError as exc:
            answer = {"error": exc.message, "hint": exc.hint, "final": exc.final, "config": False}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _call(fields: dict[str, Any], images: ReceivedImages) -> EpisodeCall:
    call = EpisodeCall(**fields)
    call.inputs, call.output = images.within(call.inputs), images.within(call.output)
    return call


def _tie(parent: int) -> None:
    """End this process with `parent`: while it waits for a server, it does not see the end of its
    input."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def main(parent: int) -> None:
    """Serve the process `parent`, which started this one."""
    _tie(parent)
    os.nice(NICENESS)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(OSError, ValueError):  # where the limit cannot be set, the run has one
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES if most < 0 else min(MEMORY_BYTES, most), most))
    # weave reports errors within itself to its makers; a run's data is not for them.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what weave prints is no answer
    _serve(sys.stdin.buffer, answers)
    os._exit(0)  # threads of weave's client would be waited for
