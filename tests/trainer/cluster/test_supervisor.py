"""The actor beside a process, without Ray: what it passes on, when it says so, and what it leaves out."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from trainer.cluster import supervisor
from trainer.cluster.supervisor import Supervisor


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without news a call would outlast the test."""
    monkeypatch.setattr(supervisor, "LONGEST_POLL_S", 3600.0)


async def begun(program: str, *gpus: str, **variables: str) -> tuple[Supervisor, int]:
    made = Supervisor()
    pid = await made.begin([sys.executable, "-c", program], variables, gpus, "/nowhere")
    assert isinstance(pid, int), pid
    return made, pid


async def until_end(made: Supervisor) -> tuple[bytes, int]:
    text, code = b"", None
    while code is None:
        more, code, _ = await made.follow()
        text += more
    return text, code


async def test_output_comes_before_the_end_and_the_end_at_once() -> None:
    made, pid = await begun("import time; print('here', flush=True); time.sleep(3600)")
    assert await made.follow() == (b"here\n", None, False)
    following = asyncio.create_task(made.follow())
    await asyncio.sleep(0)
    await made.signal(signal.SIGKILL)
    assert await following == (b"", -signal.SIGKILL, False)
    assert not psutil.pid_exists(pid)


async def test_the_end_is_told_though_a_child_of_the_process_keeps_the_pipe_open() -> None:
    made, _ = await begun("import os, time; os.fork() or time.sleep(3600); print('done')")
    assert await until_end(made) == (b"done\n", 0)
    await made.signal(signal.SIGKILL)  # the whole group


async def test_output_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "MOST_KEPT_BYTES", 100)
    made, _ = await begun("print('x' * 99_999 + 'y')")
    await made._ended.wait()
    await made._all_read.wait()
    text, code = await until_end(made)
    assert text.endswith(b"xy\n") and len(text) < 200 and b"bytes of output were lost" in text and code == 0


async def test_it_sees_the_variables_of_its_node_but_not_those_that_choose_modules(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RAY_AUTH_TOKEN", "PYTHONPATH", "PYTHONBREAKPOINT", "VIRTUAL_ENV"):
        monkeypatch.setenv(name, "wrong")
    monkeypatch.setenv("OF_THE_NODE", "1")
    names = "('RAY_AUTH_TOKEN', 'PYTHONPATH', 'PYTHONBREAKPOINT', 'VIRTUAL_ENV', 'OF_THE_NODE', 'CUDA_VISIBLE_DEVICES')"
    made, _ = await begun(
        f"import os; print([os.environ.get(name) for name in {names}])", "2", "5", PYTHONPATH="/right"
    )
    assert await until_end(made) == (b"[None, '/right', None, None, '1', '2,5']\n", 0)


async def test_sigint_is_not_blocked_as_in_ray_s_workers() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        made, _ = await begun("import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []))")
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    assert await until_end(made) == (b"set()\n", 0)


async def test_a_missing_interpreter_is_said() -> None:
    assert "does not exist on this node" in str(await Supervisor().begin(["/no/python"], {}, [], "/"))


async def test_a_stopped_process_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    made, pid = await begun("import time; print('here', flush=True); time.sleep(3600)")
    await made.follow()
    os.kill(pid, signal.SIGSTOP)
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED:  # noqa: ASYNC110  # a process sets no event
        await asyncio.sleep(0.01)
    monkeypatch.setattr(supervisor, "LONGEST_POLL_S", 0.05)
    assert await made.follow() == (b"", None, True)
    await made.signal(signal.SIGKILL)
    assert (await until_end(made))[1] == -signal.SIGKILL


def test_it_imports_nothing_of_this_project() -> None:
    """Ray's workers get it by value, and may not have the project."""
    imports = [line for line in Path(supervisor.__file__).read_text().splitlines() if "import " in line]
    assert not [line for line in imports if any(name in line for name in ("agentloop", "trainer", "tools"))]
