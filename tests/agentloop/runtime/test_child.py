"""Child processes: their logs, their readiness, and their end together with the parent."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentloop.errors import ServerStartError
from agentloop.runtime import child
from agentloop.runtime.child import Child, ChildKilled, ChildStopped, child_environment, log_tail, spawn


def child_of(tmp_path: Path, code: str) -> Child:
    return Child("the server", [sys.executable, "-c", code], child_environment(1), tmp_path / "logs" / "child.log")


async def never() -> bool:
    return False


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_child_that_ends_shows_the_end_of_its_log(tmp_path: Path) -> None:
    child = child_of(tmp_path, "for i in range(30): print('line', i)\nraise SystemExit(3)")
    with pytest.raises(ServerStartError, match="the server ended with code 3 before it served") as caught:
        await child.until_ready(never, 30)
    assert "line 29" in str(caught.value) and "line 9\n" not in str(caught.value)


async def test_a_child_that_is_slow_names_the_setting(tmp_path: Path) -> None:
    child = child_of(tmp_path, "import time; time.sleep(60)")
    with pytest.raises(ServerStartError, match=r"did not serve within 0 s(.|\n)*raise rollout.start_timeout_s"):
        await child.until_ready(never, 0.1, timeout_key="rollout.start_timeout_s")
    assert child.code is None
    await child.stop()
    assert child.code == -signal.SIGTERM


async def test_stopping_ends_what_the_child_started(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    child = child_of(
        tmp_path,
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(file)!r}, 'w').write(str(p.pid)); time.sleep(60)",
    )

    async def started() -> bool:
        return file.exists() and bool(file.read_text())

    await child.until_ready(started, 30)
    await child.kill()
    for _ in range(100):
        if not is_alive(int(file.read_text())):
            break
        await asyncio.sleep(0.05)
    assert not is_alive(int(file.read_text()))


async def test_a_child_that_the_kernel_does_not_let_go_is_left_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in an uninterruptible system call: SIGKILL has no effect."""
    child = child_of(tmp_path, "import time; time.sleep(60)")
    with monkeypatch.context() as patch:
        patch.setattr("agentloop.runtime.child.KILL_S", 0.1)
        patch.setattr("agentloop.runtime.child.os.killpg", lambda pid, number: None)
        await asyncio.wait_for(child.kill(), 10)
    assert f"the server (pid {child.pid}) has not ended" in caplog.text
    caplog.clear()
    await child.kill()
    assert child.code == -signal.SIGKILL
    assert not caplog.records


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal is Linux's")
def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    code = (
        "import asyncio, subprocess, sys, time\n"
        "from agentloop.runtime.child import child_environment, spawn\n"
        "async def main():\n"
        "    child = await spawn([sys.executable, '-c', 'import time; time.sleep(60)'],"
        " environment=child_environment(1), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        f"    open({str(file)!r}, 'w').write(str(child.pid))\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while not (file.exists() and file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    pid = int(file.read_text())
    assert is_alive(pid)
    parent.kill()
    parent.wait()
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)


async def test_a_spawned_child_has_its_own_session_and_keeps_passed_files(tmp_path: Path) -> None:
    read, write = os.pipe()
    code = f"import os; os.write({write}, str(os.getsid(0)).encode())"
    child = await spawn(
        [sys.executable, "-c", code],
        environment=child_environment(1),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[write],
    )
    assert await child.wait() == 0
    assert int(os.read(read, 20)) == child.pid != os.getsid(0)
    os.close(read)
    os.close(write)


def test_the_tail_of_a_log_that_is_missing_or_empty(tmp_path: Path) -> None:
    assert log_tail(tmp_path / "a.log") == "    (no log was written)"
    (tmp_path / "a.log").touch()
    assert log_tail(tmp_path / "a.log") == "    (the log is empty)"


def test_the_tail_of_a_huge_log_is_read_from_its_end(tmp_path: Path) -> None:
    with (tmp_path / "a.log").open("wb") as log:
        log.seek(10 * 2**30)  # takes no space
        log.write(b"\nthe end\n")
    assert log_tail(tmp_path / "a.log", lines=1) == "    the end"


async def test_an_error_shows_the_log_of_this_start_only(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "child.log"
    log.parent.mkdir()
    log.write_text("a line of an earlier start\n")
    killed = "import os; print('mine', flush=True); os.kill(os.getpid(), 9)"
    for code, error in (("print('mine'); raise SystemExit(3)", ServerStartError), (killed, ChildKilled)):
        child = child_of(tmp_path, code)
        with pytest.raises(ServerStartError, match="before it served") as raised:
            await child.until_ready(never, 30)
        assert type(raised.value) is error
        assert "mine" in raised.value.message and "earlier" not in raised.value.message


def test_the_environment_of_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert child_environment(3)["OMP_NUM_THREADS"] == "3"
    assert child_environment(3)["OMP_WAIT_POLICY"] == "passive"
    assert "OMP_WAIT_POLICY" not in child_environment(1)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert child_environment(3)["OMP_WAIT_POLICY"] == "active"
    assert "GLIBC_TUNABLES" in child_environment(1)
    assert "GLIBC_TUNABLES" not in child_environment(1, allocator=False)


@pytest.mark.parametrize("answer_s", [0.0, 0.2])
async def test_a_child_that_is_stopped_while_it_starts_is_ended(
    answer_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "LOOK_S", 0.05)
    monkeypatch.setattr(child, "STOPPED_S", 0.4)
    program = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
    server = Child("a server", [sys.executable, "-c", program], child_environment(1), tmp_path / "log")
    asked = 0

    async def not_ready() -> bool:
        nonlocal asked
        asked += 1
        await asyncio.sleep(answer_s)
        return False

    with pytest.raises(ChildStopped, match=r"a server \(process \d+\) was stopped for .* while it started"):
        await server.until_ready(not_ready, 600)
    assert server.code == -signal.SIGKILL
    if answer_s:
        assert asked < 60  # each look counts the time since the last, and not one look's
