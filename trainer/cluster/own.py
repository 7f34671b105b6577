"""A Ray cluster of one node on this machine, for one run. Nothing of it outlives the run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from agentloop.errors import ConfigError
from agentloop.runtime.child import log_tail, spawn
from trainer.locks import FileLock, is_locked

ADDRESS = "127.0.0.2"
"""Ray replaces 127.0.0.1 by the address of a network. Its servers listen on all addresses all the
same, and ask for the token."""

OBJECT_STORE_BYTES = 80 * 2**20
"""Nothing of a run goes through it, and Ray allows no less."""

FOLDERS, PREFIX = Path("/tmp"), "agentloop-ray-"  # noqa: S108  # `mkdtemp` makes a folder for this user only
"""The names of Ray's sockets must fit into 107 bytes."""

OWNER = "owner.pid"
"""Locked by the run as long as it lives."""

SETTINGS = {"memory_monitor_refresh_ms": 0}
"""A process that takes too much memory is the kernel's business, as without Ray."""

START_S = 180.0
POLL_S = 0.05
END_S = 10.0


@contextlib.asynccontextmanager
async def own_cluster(cpus: int) -> AsyncIterator[str]:
    """Yield the address of a new cluster.

    A keeper stands above it (agentloop/runtime/keeper.py). By itself Ray leaves some of its
    processes for a minute when the run is killed.

    Args:
        cpus: that it has at least. They are only counted: as without Ray, processes share the
            cores.

    Raises:
        ConfigError: it could not be started.
    """
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getuid()}-", dir=FOLDERS))
    lock = FileLock.take(folder / OWNER)
    log = folder / "start.log"
    options = {
        "port": 0,
        "node-ip-address": ADDRESS if sys.platform == "linux" else "127.0.0.1",
        "num-cpus": max(cpus, os.cpu_count() or 1),
        "object-store-memory": OBJECT_STORE_BYTES,
        "include-dashboard": "false",
        "temp-dir": folder,
        "system-config": json.dumps(SETTINGS),
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--head", "--block", *words]
    with log.open("wb") as output:
        process = await spawn(command, environment=os.environ, stdout=output, stderr=output, kept=True)
    try:
        yield await _address(process, folder / "ray_current_cluster", log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), END_S)
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


async def _address(process: asyncio.subprocess.Process, file: Path, log: Path) -> str:
    """Wait until Ray has written its address to a file."""
    for _ in range(int(START_S / POLL_S)):
        if file.exists() and (address := file.read_text().strip()):
            return address
        if process.returncode is not None:
            break
        await asyncio.sleep(POLL_S)
    raise ConfigError(
        f"a Ray cluster could not be started on this machine. Last lines of `ray start`:\n{log_tail(log)}",
        "the last lines above name the cause; cluster.kind=local needs no Ray",
    )


def _sweep() -> None:
    """Remove the folders of this user's killed runs."""
    for folder in FOLDERS.glob(f"{PREFIX}{os.getuid()}-*"):
        owner = folder / OWNER
        if owner.is_file() and not folder.is_symlink() and owner.stat().st_uid == os.getuid() and not is_locked(owner):
            shutil.rmtree(folder, ignore_errors=True)
