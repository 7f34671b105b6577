"""The environment of the processes that a run starts."""

from __future__ import annotations

import os

ALLOCATOR = ":".join(
    f"glibc.malloc.{setting}" for setting in ("hugetlb=1", f"mmap_threshold={2**25}", f"trim_threshold={2**30}")
)
"""glibc keeps what is freed and uses huge pages: else 8% of a step would go into tens of thousands of page faults."""


def child_environment(threads: int) -> dict[str, str]:
    """This process's environment, with `threads` intra-op threads: read by torch when it is imported."""
    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = str(threads)
    environment.setdefault("GLIBC_TUNABLES", ALLOCATOR)
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    return environment
