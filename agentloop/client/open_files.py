"""The limit of open files (`ulimit -n`), of which each request in flight needs one.

Beyond the limit neither a connection can be opened nor one accepted, which looks like a server
that is slow or unreachable. So programs raise the limit when they start, and a connection pool
never opens more than fit.
"""

from __future__ import annotations

import contextlib
import os
import sys

ENOUGH = 1 << 16
"""A higher limit is not asked for: some programs walk over all possible files at their start."""

UNKNOWN_OPEN = 64
"""Assumed number of open files where the system does not list them."""


def raise_limit() -> None:
    """Raise the soft limit to the hard one, for this process and those that it starts."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # macOS has a limit beside the hard one
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def most_connections(wanted: int) -> int:
    """Return how many of `wanted` connections may be open at once: at least one.

    They get half of the files that are left. The other half is for tools and logs here, and in the
    server for its own connections to its replicas.
    """
    limit = _limit()
    return wanted if limit is None else max(1, min(wanted, (limit - _open()) // 2))


def shortage(wanted: int) -> str | None:
    """Return a warning if the limit allows fewer than `wanted` connections; else None."""
    most = most_connections(wanted)
    if most >= wanted:
        return None
    return (
        f"only {_limit()} files may be open (`ulimit -n`), so at most {most} requests are in flight at once instead of "
        f"{wanted}; allow more files with `ulimit -n {max(1024, 4 * wanted)}`, which may need an administrator"
    )


def _limit() -> int | None:
    """Return the soft limit; None: there is none."""
    if sys.platform == "win32":
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def _open() -> int:
    try:
        return len(os.listdir("/dev/fd"))  # noqa: PTH208  # a count; no paths are needed
    except OSError:
        return UNKNOWN_OPEN
