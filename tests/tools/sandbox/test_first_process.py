"""What a program could do by way of its sandbox's first process, or of memory that no page of its own shows."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import psutil
import pytest

from tests.tools.sandbox.support import SMALL, Sandbox
from tools.sandbox.isolation.bubblewrap import Bubblewrap
from tools.sandbox.settings import SandboxSettings
from tools.sandbox.worker import Worker


def test_the_first_process_cannot_be_looked_into(sandbox: Sandbox) -> None:
    """It has the program's user, and none of the program's limits."""
    code = """
for name in ('mem', 'environ', 'maps', 'fd/3'):
    try: open(f'/proc/1/{name}', 'r+b' if name == 'mem' else 'rb'); print(name)
    except PermissionError: pass
open('/proc/self/environ'); open('/proc/self/maps'); print('own')
"""
    assert sandbox.printed(code) == "own\n"
    assert sandbox.printed("cat /proc/self/environ > /dev/null && echo own", "bash") == "own\n"


def test_stdin_that_does_not_fit_is_named(sandbox: Sandbox) -> None:
    found = sandbox.run("print(1)", stdin="x" * (9 * 2**20))
    assert found["status"] == "Failed"
    assert found["run_result"]["stderr"] == "[sandbox: the file .stdin could not be written: No space left on device]\n"


EMPTY_PAGES = """
import ctypes, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
size = 400 << 30
begin = libc.mmap(None, size, 1, 0x4022, -1, 0)  # read-only, without a reserve
libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), 15)  # small pages
for place in range(begin, begin + size, 2 << 20):
    ctypes.string_at(place, 1)
print('all', open('/proc/self/status').read().split('VmPTE:')[1].split()[0], flush=True)
time.sleep(3)
"""


def test_page_tables_count_as_memory(sandbox: Sandbox) -> None:
    """A program that reads one byte of every 2 MB has no page of its own, and 800 MB of the kernel's memory."""
    if "javascript" not in sandbox.health()["languages"]:
        pytest.skip("node, whose programs may reserve any address space, is not installed: apt-get install nodejs")
    code = f"require('child_process').spawnSync('python3', ['-c', {EMPTY_PAGES!r}], {{stdio: 'inherit'}})"
    found = sandbox.run(code, "javascript")
    assert found["run_result"]["return_code"] == -9, found
    assert "more memory than its limit" in found["run_result"]["stderr"]


async def test_a_start_that_is_given_up_leaves_no_child_of_bubblewrap(tmp_path: Path) -> None:
    """Before it is the first process of the sandbox, the child waits for its parent, dead or not."""
    stands_still, number = tmp_path / "bwrap", tmp_path / "number"
    stands_still.write_text(f"#!/bin/sh\nsleep 600 & echo $! > {number}.new; mv {number}.new {number}; wait\n")
    stands_still.chmod(0o755)
    with contextlib.closing(Bubblewrap(SandboxSettings(**SMALL), sandboxed=True)) as launcher:
        launcher._bwrap = str(stands_still)
        worker = Worker(launcher, None, 0)
        starting = asyncio.create_task(worker.start())
        while not number.exists():  # noqa: ASYNC110  # a file sets no event
            await asyncio.sleep(0.01)
        child = psutil.Process(int(number.read_text()))
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await worker.end()
    assert not psutil.wait_procs([child], timeout=5)[1]
