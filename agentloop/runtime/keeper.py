"""A small program between the run and an isolated function: it ends all that the function started.

Usage: `python -I -S keeper.py PID PROGRAM [ARGUMENT...]`, PID being the run's. It starts the
program and waits. When the program ends, the run ends, or SIGTERM arrives, it kills every process
that descends from the program.

A process group would not do: `setsid` leaves it. On Linux the keeper is a subreaper, the parent of
all descendants whose own parents have ended, so a daemon that forked twice is still below it.
Descendants are stopped before any is killed, so that none forks in between.

It imports little and no other file of the project, because one runs beside each worker.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
KILL_S = 5.0
"""How long to try: a descendant of another user cannot be killed."""


def main() -> None:
    """Run the program; end as it ended, after all of its descendants."""
    run, command = int(sys.argv[1]), sys.argv[2:]
    signal.pthread_sigmask(signal.SIG_BLOCK, {*STOPS, signal.SIGCHLD})
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != run:  # the run ended before it could be watched
        sys.exit(1)

    keeper = os.getpid()
    program = os.fork()
    if program == 0:
        _become(command, keeper)

    # The pipes are the program's: the run sees their ends when the program ends.
    null = os.open(os.devnull, os.O_RDWR)
    for file in (0, 1, 2):
        os.dup2(null, file)

    status = _wait(program)
    _end_descendants(program)
    _end_as(status)


def descendants(root: int) -> set[int]:
    """Return the processes below `root` that still run (Linux; empty elsewhere)."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc") if sys.platform == "linux" else ():
        if not entry.name.isdigit():
            continue
        try:
            with open(f"/proc/{entry.name}/stat", "rb") as file:  # noqa: PTH123  # see above: no pathlib
                state, parent = file.read().rpartition(b")")[2].split()[:2]
        except OSError:  # it has just ended
            continue
        if state not in b"ZX":
            children.setdefault(int(parent), []).append(int(entry.name))

    found: set[int] = set()
    left = [root]
    while left:
        below = children.get(left.pop(), [])
        found.update(below)
        left += below
    return found


def _become(command: list[str], keeper: int) -> None:
    """Replace this process by the program, in its own session, tied to the keeper."""
    os.setsid()
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        if os.getppid() == keeper:
            os.execvp(command[0], command)  # noqa: S606  # as intended
    finally:
        os._exit(127)


def _wait(program: int) -> int | None:
    """Wait until the program ends or a stop is asked for; return its wait status, or None."""
    while signal.sigwait({*STOPS, signal.SIGCHLD}) == signal.SIGCHLD:
        for pid, status in _reap():
            if pid == program:
                return status
    return None


def _reap() -> list[tuple[int, int]]:
    """Collect the children that have ended, adopted ones included."""
    ended: list[tuple[int, int]] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended.append((pid, status))


def _end_descendants(program: int) -> None:
    """Stop all descendants, kill them, and collect them."""
    _signal_all({program}, signal.SIGKILL, group=True)
    deadline = time.monotonic() + KILL_S
    while time.monotonic() < deadline:
        stopped: set[int] = set()
        while new := descendants(os.getpid()) - stopped:
            _signal_all(new, signal.SIGSTOP)
            stopped |= new
        _signal_all(stopped, signal.SIGKILL)
        _reap()
        if not stopped:
            return
        time.sleep(0.001)


def _signal_all(pids: set[int], number: signal.Signals, *, group: bool = False) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            (os.killpg if group else os.kill)(pid, number)


def _end_as(status: int | None) -> None:
    """End with the program's exit code or signal."""
    if status is not None and os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        _no_core()
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status) if status is not None else 128 + signal.SIGKILL)


def _no_core() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    main()
