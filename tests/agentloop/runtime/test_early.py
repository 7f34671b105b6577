"""Programs that import early run as if they had been started when they were needed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from agentloop.runtime import early
from agentloop.runtime.child import Child, child_environment
from agentloop.runtime.early import EarlyProgram, ForkedProcess, begin_early, early_programs, importing

PROGRAM = """
import os, sys
if __name__ == "__main__":
    import heavy
    print("arguments", sys.argv[1:], "variable", os.environ.get("VARIABLE"), "heavy", heavy.WHEN, flush=True)
    print("process", os.getpid(), os.getppid(), os.getsid(0), heavy.PID, __import__("random").random(), flush=True)
    if "--fd" in sys.argv:
        import socket
        channel = socket.socket(fileno=int(sys.argv[sys.argv.index("--fd") + 1]))
        while data := channel.recv(1000):
            channel.sendall(data.upper())
    print("collector", __import__("gc").isenabled(), file=sys.stderr)
    sys.exit(3 if "fails" in sys.argv else 0)
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="programs are forked on Linux only")


EARLIER: set[psutil.Process] = set()
"""Processes that other tests of this worker have left, such as helpers of libraries."""


@pytest.fixture(autouse=True, scope="module")
def earlier() -> None:
    EARLIER.update(psutil.Process().children())


def children() -> list[psutil.Process]:
    """Return the processes that the tests of this file have started."""
    return [child for child in psutil.Process().children() if child not in EARLIER]


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "HEAVY", ("heavy",))


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., EarlyProgram]:
    (tmp_path / "early_test_program.py").write_text(PROGRAM)
    (tmp_path / "heavy.py").write_text(
        "import os, sys\nPID = os.getpid()\nWHEN = 'late' if 'early_test_program' in sys.argv[0] else 'early'\n"
    )
    (tmp_path / "threads.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    )

    def make(*imports: str, forks: bool = True, **variables: str) -> EarlyProgram:
        environment = child_environment(1) | {"PYTHONPATH": str(tmp_path)} | variables
        return EarlyProgram("early_test_program", imports, environment, forks=forks)

    return make


async def code_of(process: early.Process) -> int:
    async with asyncio.timeout(60):
        while (code := process.poll()) is None:  # noqa: ASYNC110  # a process sets no event
            await asyncio.sleep(0.01)
    return code


async def appears(file: Path) -> None:
    async with asyncio.timeout(60):
        while not file.exists():  # noqa: ASYNC110  # a file sets no event
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("count", [1, pytest.param(3, marks=linux)])
async def test_a_program_runs_with_arguments_environment_and_log(
    program: Callable[..., EarlyProgram], tmp_path: Path, count: int
) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    one = program("not_there")
    with early_programs([one] * count):
        begun = await begin_early(one.module, ["a", "--fd", "{fd}"], {**one.environment, "VARIABLE": "x"}, log)
        others = [await begin_early(one.module, [], one.environment, tmp_path / f"{i}") for i in range(1, count)]
        assert begun is not None
        assert [await code_of(other[0]) for other in others if other is not None] == [0] * (count - 1)
        assert await begin_early(one.module, [], one.environment, log) is None  # each serves once

    process, channel = begun  # it outlives the block
    assert channel is not None
    channel.sendall(b"hello")
    assert channel.recv(1000) == b"HELLO"
    shown = psutil.Process(process.pid).cmdline()
    assert shown[1:5] == ["-P", "-m", "early_test_program", "a"]
    channel.close()
    assert await code_of(process) == 0
    before, said, where, last = log.read_text().splitlines()
    assert before == "before" and last == "collector True"
    assert said.startswith("arguments ['a', '--fd', '") and said.endswith("variable x heavy early")
    assert where.split()[1:4] == [str(process.pid), str(os.getpid()), str(process.pid)]


@linux
async def test_programs_of_one_environment_share_their_imports(
    program: Callable[..., EarlyProgram], tmp_path: Path
) -> None:
    programs = [program(), program(), program(OMP_NUM_THREADS="2"), program(forks=False)]
    with early_programs(programs):
        begun = [
            await begin_early(p.module, ["fails"], p.environment, tmp_path / f"{i}") for i, p in enumerate(programs)
        ]
        assert [await code_of(one[0]) for one in begun if one is not None] == [3, 3, 3, 3]
        assert early._subreaper() == 0
    assert not children()
    lines = [(tmp_path / f"{i}").read_text().splitlines() for i in range(4)]
    own, imported = [[line[1].split()[place] for line in lines] for place in (1, 4)]
    assert imported[0] == imported[1] not in own[:2] and imported[2:] == own[2:]
    assert len({line[1].split()[5] for line in lines}) == 4  # random numbers
    assert all("heavy early" in line[0] for line in lines)


@linux
async def test_what_some_programs_need_is_imported_while_none_is_to_run(
    program: Callable[..., EarlyProgram], tmp_path: Path
) -> None:
    began, goes, second = tmp_path / "began", tmp_path / "goes", tmp_path / "second_began"
    (tmp_path / "first.py").write_text(
        "import pathlib, time\n"
        f"pathlib.Path({str(began)!r}).touch()\n"
        f"while not pathlib.Path({str(goes)!r}).exists():\n    time.sleep(0.001)\n"
    )
    (tmp_path / "second.py").write_text(f"open({str(second)!r}, 'w').close()\n")

    one = program("first", "second")
    with early_programs([one, program()]):
        await appears(began)
        goes.touch()
        await appears(second)

    for file in (began, goes, second):
        file.unlink()
    with early_programs([one, program()]):
        await appears(began)
        waiting = [asyncio.create_task(begin_early(one.module, [], one.environment, tmp_path / n)) for n in "ab"]
        await asyncio.sleep(0.05)  # the first is sent
        goes.touch()
        begun = await asyncio.gather(*waiting)
    assert [await code_of(process[0]) for process in begun if process is not None] == [0, 0]
    assert not second.exists()


async def test_a_program_that_ends_at_once_has_run(
    program: Callable[..., EarlyProgram], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, loop = program(), asyncio.get_running_loop()
    send = loop.sock_sendall

    async def send_and_wait(control: socket.socket, data: bytes) -> None:
        await send(control, data)
        for child in children():
            while child.status() != psutil.STATUS_ZOMBIE:  # noqa: ASYNC110  # a process sets no event
                await asyncio.sleep(0.001)

    monkeypatch.setattr(loop, "sock_sendall", send_and_wait)
    with early_programs([one]):
        begun = await begin_early(one.module, ["fails"], one.environment, tmp_path / "log")
    assert begun is not None and await code_of(begun[0]) == 3
    assert (tmp_path / "log").read_text().count("arguments ['fails']") == 1


async def test_a_variable_that_is_read_at_the_start_must_be_the_same(
    program: Callable[..., EarlyProgram], tmp_path: Path
) -> None:
    one = program()
    for threads, found in (("1", True), ("2", False)):
        environment = {**one.environment, "OMP_NUM_THREADS": threads}
        with early_programs([one]):
            begun = await begin_early(one.module, [], environment, tmp_path / threads)
            assert (begun is not None) is found
        if begun is not None:
            child = Child("child", [], environment, tmp_path / threads, early=begun[0], log_start=0)
            assert await child.ended() == 0 and "heavy early" in child.log_tail()


@linux
async def test_a_process_with_threads_is_not_forked(program: Callable[..., EarlyProgram], tmp_path: Path) -> None:
    early.HEAVY += ("threads",)  # the fixture undoes it
    one = program()
    with early_programs([one, one]):
        assert await begin_early(one.module, [], one.environment, tmp_path / "log") is None
        assert await begin_early(one.module, [], one.environment, tmp_path / "log") is None
        assert not children()
    assert not (tmp_path / "log").exists()


async def test_imports_begin_before_the_programs_are_known(
    program: Callable[..., EarlyProgram], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    one = program()
    with importing():
        first = children()
        with early_programs([program(OMP_NUM_THREADS="2"), one]):
            begun = await begin_early(one.module, [], one.environment, tmp_path / "log")
            assert begun is not None and [begun[0].pid] == [child.pid for child in first]
    assert await code_of(begun[0]) == 0
    with importing(), early_programs([program(OMP_NUM_THREADS="2")]):
        assert len(children()) == 1  # the first is of no use
    with pytest.raises(ZeroDivisionError), importing():
        1 / 0  # noqa: B018
    assert not children()


async def test_programs_that_are_not_needed_or_have_ended_are_gone(
    program: Callable[..., EarlyProgram], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    (tmp_path / "ends.py").write_text("import os\nos._exit(3)\n")
    bad = program("ends", forks=False)
    with pytest.raises(ZeroDivisionError), early_programs([program(), bad]):
        started[1].wait()
        1 / 0  # noqa: B018
    assert started[0].returncode in (0, -9)  # it may see that its socket is closed before it is killed
    assert started[1].returncode == 3
    with early_programs([bad]):
        started[2].wait()
        assert await begin_early(bad.module, [], bad.environment, tmp_path / "log") is None


@linux
async def test_a_cancelled_start_leaves_no_process(program: Callable[..., EarlyProgram], tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(600)\n")
    early.HEAVY += ("slow",)  # the fixture undoes it
    one = program()
    with early_programs([one, one]):
        waiting = asyncio.create_task(begin_early(one.module, [], one.environment, tmp_path / "log"))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        assert not children() and early._subreaper() == 0


@linux
@pytest.mark.parametrize("when", ["waits", "runs"])
def test_an_early_program_ends_with_the_command(tmp_path: Path, when: str) -> None:
    (tmp_path / "sleeps.py").write_text("import time\ntime.sleep(600)\n")
    code = f"""
    import asyncio, os, signal
    from pathlib import Path
    from agentloop.runtime import early
    from agentloop.runtime.child import child_environment
    early.HEAVY = ("json",)
    environment = child_environment(1) | {{"PYTHONPATH": {str(tmp_path)!r}}}
    program = early.EarlyProgram("sleeps", [], environment)
    with early.early_programs([program, program]):
        print(early._waiting[0].importer.process.pid, flush=True)
        if {when!r} == "runs":
            for log in "12":
                begun = asyncio.run(early.begin_early("sleeps", [], environment, Path({str(tmp_path)!r}, log)))
                print(begun[0].pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    pids = [int(word) for word in run.stdout.split()]
    assert len(pids) == (3 if when == "runs" else 1), run.stderr
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline, "an early program still runs"
        time.sleep(0.01)


def test_a_forked_process_has_an_exit_code_and_can_be_killed() -> None:
    for code, kill in ((7, False), (-signal.SIGKILL, True)):
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            ours.close()
            theirs.recv(1)
            os._exit(7)
        theirs.close()
        process = ForkedProcess(pid)
        assert process.poll() is None
        process.kill() if kill else ours.close()
        while (found := process.poll()) is None:
            time.sleep(0.01)
        assert found == process.poll() == code
        process.kill()  # nothing happens
        ours.close()


@linux
async def test_a_program_can_be_killed_as_soon_as_it_has_begun(
    program: Callable[..., EarlyProgram], tmp_path: Path
) -> None:
    imported = tmp_path / "imported"
    (tmp_path / "slow.py").write_text(
        "import os, time\nsetsid = os.setsid\nos.setsid = lambda: (time.sleep(1), setsid())\n"
        f"open({str(imported)!r}, 'w').close()\n"
    )
    one, log = program("slow"), tmp_path / "log"
    with early_programs([one] * 2):
        await appears(imported)
        async with asyncio.timeout(60):
            begun = await begin_early(one.module, ["--fd", "{fd}"], one.environment, log)
        assert begun is not None and begun[1] is not None
        child = Child("program", [], one.environment, log, early=begun[0])
        async with asyncio.timeout(5):
            await child.kill()
        assert child.code == -signal.SIGKILL
        begun[1].close()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
