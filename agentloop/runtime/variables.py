"""The environment variables of child processes."""

from __future__ import annotations

import os
from collections.abc import Mapping

ALLOCATOR = ":".join(
    f"glibc.malloc.{setting}" for setting in ("hugetlb=1", f"mmap_threshold={2**25}", f"trim_threshold={2**30}")
)
"""glibc keeps freed memory and uses huge pages: page faults would take 8% of a step."""


def child_environment(threads: int, *, allocator: bool = True, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment with `threads` intra-op threads for torch.

    Args:
        allocator: also set `ALLOCATOR`. Leave it out where a child's address space is limited.
        base: used in place of this process's environment.
    """
    environment = dict(os.environ if base is None else base)
    environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = str(threads)
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    if threads > 1:
        # The threads of a process wait for each other at the end of every operation, actively by
        # default. With a second busy process on the same cores, what they wait for cannot run then:
        # the forward pass of a model of 135 M parameters took five times as long on two cores.
        environment.setdefault("OMP_WAIT_POLICY", "passive")
    if allocator:
        environment.setdefault("GLIBC_TUNABLES", ALLOCATOR)
    return environment
