"""What a process may take is bounded while it reads answers of others, and not afterwards."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import mmap, resource
from agentloop.trace.sender.memory import MEMORY_BYTES, bound_memory
before = resource.getrlimit(resource.RLIMIT_AS)
undo = bound_memory()
mmap.mmap(-1, MEMORY_BYTES // 2).close()  # address space alone
try:
    mmap.mmap(-1, 2 * MEMORY_BYTES)
except OSError:
    print("bounded")
undo()
print(resource.getrlimit(resource.RLIMIT_AS) == before)
"""


def test_memory_is_bounded_until_that_is_undone() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["bounded", "True"]
