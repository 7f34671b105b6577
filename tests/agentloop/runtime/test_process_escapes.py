"""What the sandbox's escape suite tries, from a function with `run_in: process`: what is held, and what is not.

A process protects the run from faults of a function, not from a function that means harm: it has the rights of the run.
Both columns are the table of docs/agents.md.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from agentloop.tool.loading import load_toolset
from agentloop.tool.session import Toolset
from agentloop.types import Task, ToolCall, ToolResult

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what is left is found by /proc")

FUNCTION = '''
import json

def work(code: str) -> str:
    """Run a case.

    Args:
        code: Python that sets `said`
    """
    names = {"said": None}
    exec(code, names)
    return json.dumps(names["said"])
'''

WORKERS, MEMORY_MB, LIMIT_S = 2, 1500, 0.7


class Case:
    """A tool in processes, and what runs below this one since."""

    def __init__(self, toolset: Toolset) -> None:
        self.toolset = toolset
        self._before = {process.pid for process in psutil.Process().children(recursive=True)}

    async def call(self, code: str, limit_s: float = 60.0) -> ToolResult:
        session = self.toolset.session(Task("0", "a", []))
        return await session.call(ToolCall("work", {"code": code}), limit_s)

    async def said(self, code: str) -> Any:
        result = await self.call(code)
        assert result.error is None, result.error
        return json.loads(result.text)

    async def works(self) -> None:
        """The next call works."""
        assert await self.said("said = 6 * 7") == 42

    async def close(self) -> None:
        """End the tool; whatever it started has to end with it."""
        self.toolset.close()
        for _ in range(1000):
            found = [p for p in psutil.Process().children(recursive=True) if p.pid not in self._before]
            if not [p for p in found if alive(p)]:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"left: {found}")


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:  # it ended since it was listed
        return False


@pytest_asyncio.fixture
async def case(tmp_path: Path) -> AsyncIterator[Case]:
    (tmp_path / "functions.py").write_text(FUNCTION)
    config = f"{{run_in: process, workers: {WORKERS}, memory_mb: {MEMORY_MB}}}"
    (tmp_path / "tools.yaml").write_text(f"tools: [{{class_name: ./functions.py:work, config: {config}}}]")
    found = Case(load_toolset(tmp_path / "tools.yaml"))
    yield found
    await found.close()


STOPPED = f"work took longer than {LIMIT_S:g} s and was stopped"

ENDED = {
    "sleeping past the time limit, with every signal ignored": (
        "import signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\ntime.sleep(600)",
        STOPPED,
    ),
    "computing without end": ("while True: pass", STOPPED),
    "threads": (
        "import threading, time\nfor _ in range(8): threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "time.sleep(600)",
        STOPPED,
    ),
    "child processes": (
        "import os, time\nfor _ in range(30):\n    if os.fork() == 0: time.sleep(600)\ntime.sleep(600)",
        STOPPED,
    ),
    "daemons": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(600)\n"
        "    os._exit(0)\ntime.sleep(600)",
        STOPPED,
    ),
    "output without end": ("import os\nwhile True: os.write(1, b'x\\n' * 9999)", STOPPED),
    "output without line ends that is not text": ("import os\nwhile True: os.write(2, b'\\xff' * 9999)", STOPPED),
    "a crash": ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "was killed by SIGSEGV"),
    "an exit": ("import os\nos._exit(3)", "ended with exit code 3"),
    "a signal to its process group": ("import os\nos.killpg(0, 9)", "was killed by SIGKILL"),
    "more memory than `memory_mb`": ("bytearray(4 << 30)", "MemoryError"),
    "an answer that is not one": (
        "import os\nfor file in map(int, os.listdir('/proc/self/fd')):\n    if file > 11:\n"
        "        try: os.write(file, (6).to_bytes(4) + b'no one')\n        except OSError: pass",
        "wrote something other than its answer",
    ),
}
"""What ends with its call: code, and the message for the model."""

HELD = (*ENDED, "a result without measure", "all workers that hang", "changes of its environment and folder")

NOT_HELD = (
    "network", "files", "the environment of the run", "signals to other processes",
    "disk space and number of processes", "the memory of its processes together", "system calls and rights",
    "what it leaves for the next call", "daemons, once it has killed its parent",
)  # fmt: skip


@pytest.mark.parametrize("name", ENDED)
async def test_it_ends_with_its_call(case: Case, name: str) -> None:
    code, told = ENDED[name]
    await case.works()  # it has started: only the call is measured
    result = await case.call(code, LIMIT_S if told == STOPPED else 60.0)
    assert result.error is not None and told in result.error, result
    assert len(result.text) < 1_100_000
    await case.works()


async def test_a_result_without_measure_is_cut(case: Case) -> None:
    result = await case.call("said = 'x' * 20_000_000")
    assert result.error is None and len(result.text) == 1_000_000
    await case.works()


async def test_workers_that_all_hang_serve_the_next(case: Case) -> None:
    """Those that wait for one are not told that they took too long: their time begins with their turn."""
    hanging = [asyncio.create_task(case.call("import time\ntime.sleep(600)", LIMIT_S)) for _ in range(2 * WORKERS)]
    await asyncio.sleep(0)
    served = await case.call("said = 'served'", LIMIT_S)
    assert (served.text, served.error) == ('"served"', None)
    assert {result.error for result in await asyncio.gather(*hanging)} == {STOPPED}


async def test_its_environment_and_folder_are_its_own(case: Case) -> None:
    await case.said("import os\nos.environ['AGENTLOOP_TEST_CHANGED'] = 'x'\nos.chdir('/')")
    assert "AGENTLOOP_TEST_CHANGED" not in os.environ and Path.cwd() != Path("/")


async def test_the_network_is_open(case: Case) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert (
            await case.said(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 20)\nsaid = 'done'")
            == "done"
        )
        server.settimeout(20)
        server.accept()[0].close()


async def test_files_are_open(case: Case, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s3cret")
    code = f"said = open({str(tmp_path / 'secret')!r}).read()\nopen({str(tmp_path / 'left')!r}, 'w').write('x')"
    assert await case.said(code) == "s3cret"
    assert (tmp_path / "left").exists()


async def test_the_environment_of_the_run_can_be_read(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTLOOP_TEST_SECRET", "s3cret")
    assert await case.said("import os\nsaid = os.environ['AGENTLOOP_TEST_SECRET']") == "s3cret"


async def test_other_processes_can_be_killed(case: Case) -> None:
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as other:  # noqa: ASYNC220
        await case.said(f"import os\nos.kill({other.pid}, 9)")
        assert other.wait(20) == -signal.SIGKILL
    assert await case.said(f"import os\nsaid = os.kill({os.getpid()}, 0)") is None, "so could the run"


async def test_disk_space_and_processes_have_the_limits_of_the_run(case: Case) -> None:
    names = ("RLIMIT_FSIZE", "RLIMIT_NPROC", "RLIMIT_NOFILE", "RLIMIT_CPU")
    found = await case.said(f"import resource\nsaid = [resource.getrlimit(getattr(resource, n)) for n in {names}]")
    assert [tuple(limit) for limit in found] == [resource.getrlimit(getattr(resource, name)) for name in names]


async def test_each_process_has_the_memory_limit_for_itself(case: Case) -> None:
    code = f"""
import os
def child():
    read, write = os.pipe()
    if os.fork() == 0:
        taken = bytearray({MEMORY_MB // 2} << 20)
        os.write(write, str(len(taken)).encode())
        __import__("time").sleep(600)
    return int(os.read(read, 20))
said = sum(child() for _ in range(4))
"""
    assert await case.said(code) == 4 * (MEMORY_MB // 2 << 20)


async def test_system_calls_and_rights_are_those_of_the_run(case: Case) -> None:
    fields = "[line.split()[1] for line in open('/proc/self/status') if line.startswith(('Cap', 'Seccomp:', 'NoNew'))]"
    assert await case.said(f"said = {fields}") == eval(fields)  # the same text, here
    assert await case.said("import os\nsaid = os.getuid()") == os.getuid()


async def test_the_next_call_finds_what_it_leaves(case: Case) -> None:
    await case.said("import builtins, os\nbuiltins.left = os.getpid()")
    found = await case.said("import builtins, os\nsaid = [getattr(builtins, 'left', None), os.getpid()]")
    assert found[0] == found[1]


async def test_a_daemon_survives_if_the_parent_was_killed(case: Case, tmp_path: Path) -> None:
    """The keeper of the worker, which ends all that the function started, is a process like others."""
    file = tmp_path / "daemon"
    code = f"""
import os, time
keeper = os.getppid()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        open({str(file)!r} + '~', 'w').write(str(os.getpid()))
        os.rename({str(file)!r} + '~', {str(file)!r})
        time.sleep(600)
    os._exit(0)
while not os.path.exists({str(file)!r}): time.sleep(0.01)
os.kill(keeper, 9)
time.sleep(600)
"""
    await case.works()
    result = await case.call(code, 3.0)  # the daemon holds the worker's pipes: the end is not seen before
    daemon = psutil.Process(int(file.read_text()))
    try:
        assert result.error == "work took longer than 3 s and was stopped"
        assert daemon.is_running() and daemon.status() != psutil.STATUS_ZOMBIE
    finally:
        daemon.kill()
    await case.works()


def test_the_table_of_the_documentation_names_every_case(repo: Path) -> None:
    section = (repo / "docs/agents.md").read_text().partition("| held |")[2].partition("\n\n")[0]
    held, not_held = section.splitlines()[-1].strip("| ").split(" | ")
    assert held.split("; ") == list(HELD)
    assert not_held.split("; ") == list(NOT_HELD)
