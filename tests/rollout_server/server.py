"""A rollout server in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
PROGRAM = ("rollout_server",)


class Server:
    """`python -m rollout_server` with options, or another program that starts it."""

    def __init__(self, folder: Path, *options: str, program: Sequence[str] = PROGRAM) -> None:
        self.log = folder / "server.log"
        self._ready = folder / "ready.json"
        command = [
            sys.executable, "-P", "-m", *program, "--ready-file", str(self._ready),
            "--log-dir", str(folder / "logs"), *options,
        ]  # fmt: skip
        with self.log.open("wb") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environment)

    @property
    def url(self) -> str:
        while not self._ready.exists():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        return str(json.loads(self._ready.read_text())["url"])

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> None:
        """Ask it to end, and wait."""
        self.process.terminate()
        self.process.wait(30)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)
