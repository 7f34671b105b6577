"""The code sandbox: latency, throughput, a long queue, and memory, through the real server.

    python benchmarks/sandbox.py

`latency`: a trivial program, one at a time, with a pause in which the sandbox that was used is replaced.
`throughput`: such programs from 16 clients. `cold`: beside it, plain bubblewrap with a cold python, 16 at once.
`queue`: 1,000 programs at once; all of them are answered, in the order of arrival as far as 16 at a time allow.
`memory`: proportional set size of a waiting sandbox (all of its processes), and the growth of the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
from quick import QUICK, add_quick_option, expect

from agentloop.client.open_files import raise_limit

MAX_P50_MS, MIN_PROGRAMS_S, CLIENTS = 60.0, 30.0, 16
PROGRAM = "print(6 * 7)"
COLD = [
    "bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--ro-bind", "/usr", "/usr", "--symlink", "usr/lib",
    "/lib", "--symlink", "usr/lib64", "/lib64", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp",
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=300, help="of the throughput")
    parser.add_argument("--queued", type=int, default=1000, help="programs that are sent at once")
    parser.add_argument("--json", type=Path, help="write the figures here")
    add_quick_option(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.programs, arguments.queued = 32, 48

    raise_limit()  # of open files: each program that waits is a connection
    with _server() as (url, process):
        figures = asyncio.run(_measure(url, process, arguments))
    figures["cold/programs_s"] = _cold(min(arguments.programs, 200))
    for name, value in figures.items():
        print(f"{name:32s} {value:10.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))

    misses = [
        text
        for missed, text in (
            (figures["latency/p50_ms"] > MAX_P50_MS, f"a trivial program takes more than {MAX_P50_MS:g} ms"),
            (figures["throughput/programs_s"] < MIN_PROGRAMS_S, f"fewer than {MIN_PROGRAMS_S:g} programs/s"),
        )
        if missed
    ]
    if arguments.quick:
        print(QUICK)
        return 0
    for miss in misses:
        print("MISSED:", miss)
    return 1 if misses else 0


@contextmanager
def _server() -> Iterator[tuple[str, psutil.Process]]:
    command = [sys.executable, "-m", "agentloop", "sandbox", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line.startswith("sandbox: "):
            raise SystemExit("the server did not start")
        try:
            yield line.split()[1], psutil.Process(server.pid)
        finally:
            server.terminate()


async def _measure(url: str, process: psutil.Process, arguments: argparse.Namespace) -> dict[str, float]:
    limits = httpx.Limits(max_connections=arguments.queued)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await _settled(client)
        figures = _memory(process, await _health(client, "idle"))
        before = process.memory_info().rss

        seconds = []
        for _ in range(10 if arguments.quick else 60):
            seconds.append(await _program(client))
            await asyncio.sleep(0.1)
        figures["latency/p50_ms"] = 1e3 * statistics.median(seconds)
        figures["latency/p99_ms"] = 1e3 * sorted(seconds)[int(0.99 * len(seconds))]

        await _settled(client)
        started = time.perf_counter()
        left = iter(range(arguments.programs))

        async def one_client() -> None:
            for _ in left:
                await _program(client)

        await asyncio.gather(*(one_client() for _ in range(CLIENTS)))
        figures["throughput/programs_s"] = arguments.programs / (time.perf_counter() - started)

        await _settled(client)
        started = time.perf_counter()
        seconds = await asyncio.gather(*(_program(client) for _ in range(arguments.queued)))
        figures["queue/programs"] = float(len(seconds))
        figures["queue/programs_s"] = len(seconds) / (time.perf_counter() - started)
        figures["queue/slowest_s"] = max(seconds)
        figures["memory/server_growth_mb"] = (process.memory_info().rss - before) / 2**20
        await _settled(client)
        expect("programs that run at the end", await _health(client, "running"), 0)
    return figures


async def _program(client: httpx.AsyncClient) -> float:
    """Run a program; return its seconds. One that fails ends the benchmark."""
    started = time.perf_counter()
    answer = await client.post("/run_code", json={"code": PROGRAM, "language": "python", "run_timeout": 60})
    seconds = time.perf_counter() - started
    found = answer.json()
    expect("the answer to a program", found.get("run_result") and found["run_result"]["stdout"], "42\n")
    return seconds


async def _health(client: httpx.AsyncClient, key: str) -> int:
    return int((await client.get("/health")).json()[key])


async def _settled(client: httpx.AsyncClient) -> None:
    """Wait until as many sandboxes wait as the server keeps."""
    warm = 8
    for _ in range(600):
        if await _health(client, "idle") == warm:
            return
        await asyncio.sleep(0.05)
    raise SystemExit("the server does not fill its pool")


def _memory(process: psutil.Process, sandboxes: int) -> dict[str, float]:
    """Return the megabytes of one waiting sandbox: of bubblewrap outside, and of its first process."""
    total = sum(child.memory_full_info().pss for child in process.children(recursive=True))
    return {"memory/waiting_sandbox_mb": total / max(1, sandboxes) / 2**20}


def _cold(programs: int) -> float:
    """Return programs a second of plain bubblewrap with the system's python, 16 at once."""
    python = shutil.which("python3", path="/usr/bin:/bin")
    if python is None:
        return float("nan")
    command = [*COLD, python, "-c", PROGRAM]
    started = time.perf_counter()
    running: list[subprocess.Popen[bytes]] = []
    for _ in range(programs):
        if len(running) == CLIENTS:
            expect("the exit code of plain bubblewrap", running.pop(0).wait(), 0)
        running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, env={"PATH": os.defpath}))
    for each in running:
        expect("the exit code of plain bubblewrap", each.wait(), 0)
    return programs / (time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
