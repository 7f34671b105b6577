"""A trace server as a process, and the environment in which weave's client uses it and no other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CLOSED = "http://127.0.0.1:9"
"""A port without a server: where weave would look for newer versions of itself, or report errors."""


class TraceServer:
    """`agentloop trace serve` as a process."""

    def __init__(self, runs: Path, *arguments: str, port: int = 0) -> None:
        command = [sys.executable, "-m", "agentloop", "trace", "serve", str(runs), "--port", str(port), *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1)
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        assert first.startswith("viewer: http"), first
        self.url = first.removeprefix("viewer: ").strip().partition("?")[0].rstrip("/")

    def variables(self) -> dict[str, str]:
        """Return an environment in which weave's client uses this server, and no other."""
        kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "TMPDIR", "VIRTUAL_ENV")}
        return {
            **kept,
            "WANDB_BASE_URL": self.url,
            "WF_TRACE_SERVER_URL": self.url,
            "WANDB_API_KEY": "local",
            "WANDB_ERROR_REPORTING": "false",
            "HTTPS_PROXY": CLOSED,
            "ALL_PROXY": CLOSED,
            "NO_PROXY": "127.0.0.1",
            "WEAVE_USE_SERVER_CACHE": "false",
            "WEAVE_RETRY_MAX_ATTEMPTS": "1",
            "OMP_NUM_THREADS": "1",
        }

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
