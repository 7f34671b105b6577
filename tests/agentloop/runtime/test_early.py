"""Programs that import early run as if they had been started when they were needed."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agentloop.runtime.child import Child, child_environment
from agentloop.runtime.early import EarlyProgram, begin_early, early_programs

PROGRAM = """
import os, sys
if __name__ == "__main__":
    import heavy
    print("arguments", sys.argv[1:], "variable", os.environ.get("VARIABLE"), "heavy", heavy.WHEN, flush=True)
    if "--fd" in sys.argv:
        import socket
        channel = socket.socket(fileno=int(sys.argv[sys.argv.index("--fd") + 1]))
        while data := channel.recv(1000):
            channel.sendall(data.upper())
    print("collector", __import__("gc").isenabled(), file=sys.stderr)
"""


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., EarlyProgram]:
    (tmp_path / "early_test_program.py").write_text(PROGRAM)
    (tmp_path / "heavy.py").write_text(
        "import sys\nWHEN = 'early' if 'early_test_program' not in sys.argv[0] else 'late'\n"
    )
    root = str(Path(__file__).resolve().parents[3])

    def make(*imports: str, **variables: str) -> EarlyProgram:
        path = os.pathsep.join([str(tmp_path), root])
        environment = child_environment(1) | {"PYTHONPATH": path} | variables
        return EarlyProgram("early_test_program", imports or ("heavy",), environment)

    return make


def test_a_program_runs_with_arguments_environment_and_log(
    program: Callable[..., EarlyProgram], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    one = program("not_there", "heavy")
    with early_programs([one]):
        begun = begin_early(one.module, ["a", "--fd", "{fd}"], {**one.environment, "VARIABLE": "x"}, log)
        assert begun is not None
        assert begin_early(one.module, [], one.environment, log) is None  # each serves once
    process, channel = begun  # it outlives the block
    channel.sendall(b"hello")
    assert channel.recv(1000) == b"HELLO"
    channel.close()
    assert process.wait(30) == 0
    before, said, last = log.read_text().splitlines()
    assert before == "before" and last == "collector True"
    assert said.startswith("arguments ['a', '--fd', '") and said.endswith("variable x heavy early")


def test_a_child_is_an_early_program_where_one_fits(program: Callable[..., EarlyProgram], tmp_path: Path) -> None:
    one = program()
    for threads, when in (("1", "early"), ("2", "late")):  # a variable that is read at the start must be the same
        log = tmp_path / threads / "log"
        with early_programs([one]):
            command = [sys.executable, "-P", "-m", one.module, "a"]
            child = Child("child", command, {**one.environment, "OMP_NUM_THREADS": threads}, log)
        while child.code is None:
            time.sleep(0.01)
        assert child.code == 0
        assert f"arguments ['a'] variable None heavy {when}" in log.read_text()


def test_programs_that_are_not_needed_or_have_ended_are_gone(
    program: Callable[..., EarlyProgram], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    (tmp_path / "ends.py").write_text("import os\nos._exit(3)\n")
    bad = program("ends")
    with pytest.raises(ZeroDivisionError), early_programs([program(), bad]):
        started[1].wait()
        1 / 0  # noqa: B018
    assert [process.returncode for process in started] == [-9, 3]
    with early_programs([bad]):
        started[2].wait()
        assert begin_early(bad.module, [], bad.environment, tmp_path / "log") is None


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal is Linux's")
def test_an_early_program_ends_with_the_command(tmp_path: Path) -> None:
    code = """
    import os, signal, subprocess
    from agentloop.runtime import early
    from agentloop.runtime.child import child_environment
    with early.early_programs([early.EarlyProgram("none", ["json"], child_environment(1))]):
        print(early._waiting[0].process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    status = Path(f"/proc/{int(run.stdout)}/stat")
    for _ in range(1000):
        try:
            if status.read_text().rsplit(")", 1)[1].split()[0] in "ZX":
                return
        except FileNotFoundError:
            return
        time.sleep(0.01)
    raise AssertionError("the early program still runs")
