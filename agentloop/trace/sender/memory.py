"""A bound for the memory of a process that reads answers of other programs."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable
from pathlib import Path

MEMORY_BYTES = 4 * 2**30
"""Address space beside what the process has: an answer without end fails, and takes no more."""


def bound_memory() -> Callable[[], None]:
    """Let this process take `MEMORY_BYTES` more at the most; return what undoes it."""
    least, most = resource.getrlimit(resource.RLIMIT_AS)
    bound = min([_taken() + MEMORY_BYTES, *(limit for limit in (least, most) if limit != resource.RLIM_INFINITY)])

    def set_to(limit: int) -> None:
        with contextlib.suppress(OSError, ValueError):  # where the limit cannot be set
            resource.setrlimit(resource.RLIMIT_AS, (limit, most))

    set_to(bound)
    return lambda: set_to(least)


def _taken() -> int:
    """Return the address space of this process in bytes; 0 where the system does not say it."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 0
