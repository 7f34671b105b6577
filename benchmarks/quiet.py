"""How much of the cores other processes took while something was measured: a ratio on a busy machine means nothing."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

QUIET_CORES = 0.1
"""Cores that others may take on average, this machine's housekeeping counted."""

STAT = Path("/proc/stat")


class OtherLoad:
    """`cores`: what others took of the cores that this process may use, on average over the block; None if not known.

    The children of the block have to be waited for inside it, and their children by them.
    """

    cores: float | None = None

    def __enter__(self) -> OtherLoad:
        self._begin = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        if STAT.exists():
            before, now = self._begin, self._now()
            seconds, busy, own = (after - first for first, after in zip(before, now, strict=True))
            self.cores = max(0.0, busy - own) / max(seconds, 1e-9)

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Clock, busy seconds of our cores (time stolen by other virtual machines counted), CPU seconds of our own."""
        busy = core_busy_s(*os.sched_getaffinity(0))
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return time.perf_counter(), busy, sum(usage.ru_utime + usage.ru_stime for usage in usages)


def core_busy_s(*cores: int) -> float:
    """Seconds that these cores were busy since the machine's start, summed; 0 where that is not known."""
    busy = 0
    if STAT.exists():
        mine = {f"cpu{core}" for core in cores}
        for line in STAT.read_text(encoding="ascii").splitlines():
            name, *fields = line.split()
            if name in mine:
                user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
                busy += user + nice + system + irq + softirq + steal
    return float(busy / os.sysconf("SC_CLK_TCK"))
