"""The server around the sandboxes: its command, its checks before it starts, cgroups, the pool."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from agentloop.errors import ConfigError, ToolError
from tests.tools.sandbox.support import SMALL, Serving, descendants
from tools.sandbox.commands import register
from tools.sandbox.isolation.bubblewrap import Bubblewrap
from tools.sandbox.isolation.cgroup import Cgroups, find_cgroups
from tools.sandbox.isolation.diagnosis import what_to_change
from tools.sandbox.pool import Pool
from tools.sandbox.runner import check
from tools.sandbox.settings import SandboxSettings
from tools.sandbox.worker import Worker


def test_every_setting_is_an_option_with_its_description() -> None:
    app = typer.Typer()
    register(app)
    text = " ".join(CliRunner().invoke(app, ["sandbox", "serve", "--help"], env={"COLUMNS": "400"}).stdout.split())
    assert text.count("repeat for more") == 1, "of --preload"
    for name, field in SandboxSettings.model_fields.items():
        assert "--" + name.replace("_", "-") in text
        assert field.description
        assert field.description.split(";")[0].split(",")[0].replace("null: ", "default: ")[:40] in text


def test_a_wrong_option_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, ["sandbox", "serve", "--memory-mb", "1"])
    assert isinstance(result.exception, ConfigError)
    assert result.exception.message.startswith("--memory-mb: ")


def test_the_command_serves_until_it_is_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "agentloop", "sandbox", "serve", "--port", "0", "--warm", "0"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith("sandbox: http://127.0.0.1:")
        server.terminate()
        assert server.wait(20) == 0
    assert not list(tmp_path.iterdir()), "its temporary folder is removed"


def test_without_bubblewrap_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError) as found:
        Bubblewrap(SandboxSettings())
    assert "apt-get install bubblewrap" in str(found.value)
    assert "--run-programs-without-a-sandbox" in str(found.value)


def test_an_interpreter_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="no-python"):
        Bubblewrap(SandboxSettings(python=Path("/no-python")))


def test_without_user_namespaces_it_says_what_to_change() -> None:
    """In a user namespace that allows no further one, as a machine where they are off."""
    code = (
        "import asyncio\nfrom tools.sandbox.isolation.bubblewrap import Bubblewrap\n"
        "from tools.sandbox.runner import check\n"
        "from tools.sandbox.settings import SandboxSettings as S\n"
        "asyncio.run(check(S(), Bubblewrap(S())))"
    )
    limited = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "sh", "-c", limited, "sh", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ConfigError: no program can be run" in done.stderr
    assert "sysctl -w user.max_user_namespaces=15000" in done.stderr


@pytest.mark.parametrize(
    ("said", "settings", "fix"),
    [
        ("bwrap: No permissions to create new namespace", {}, "--security-opt"),
        ("bwrap: Can't mount proc on /newroot/proc: Operation not permitted", {}, "systempaths=unconfined"),
        ("execvp python3: Permission denied", {}, "--python"),
        (
            "bwrap: setting up uid map: Permission denied",
            {"user/max_user_namespaces": "0"},
            "max_user_namespaces=15000",
        ),
        ("something else", {}, "docs/sandbox.md"),
    ],
)
def test_the_fix_fits_what_bubblewrap_said(said: str, settings: dict[str, str], fix: str, tmp_path: Path) -> None:
    for name, value in settings.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(value + "\n")
    assert fix in what_to_change(said, tmp_path)


def test_ubuntu_and_debian_settings_are_recognized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    (tmp_path / "kernel").mkdir()
    (tmp_path / "kernel/apparmor_restrict_unprivileged_userns").write_text("1\n")
    assert "AppArmor" in what_to_change("bwrap: setting up uid map: Permission denied", tmp_path)
    (tmp_path / "kernel/unprivileged_userns_clone").write_text("0\n")
    assert "unprivileged_userns_clone=1" in what_to_change("", tmp_path)


def test_a_sandbox_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2; exit 1\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    launcher = Bubblewrap(SandboxSettings(**SMALL))
    with pytest.raises(ConfigError) as found:
        asyncio.run(check(SandboxSettings(**SMALL), launcher))
    launcher.close()
    assert "No permissions to create new namespace" in found.value.message
    assert "--security-opt" in str(found.value.hint)


@pytest.mark.parametrize(
    ("name", "says"), [("nosuchmod", "No module named 'nosuchmod'"), ("this_raises", "RuntimeError: planted")]
)
def test_a_module_to_preload_that_cannot_be_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str
) -> None:
    (tmp_path / "this_raises.py").write_text("raise RuntimeError('planted')")
    before = Bubblewrap(SandboxSettings(**SMALL), sandboxed=False).packages
    monkeypatch.setattr(Bubblewrap, "packages", (*before, str(tmp_path)))
    for wanted, good in ((("json", name), False), (("json",), True)):
        settings = SandboxSettings(**SMALL, preload=wanted)
        launcher = Bubblewrap(settings, sandboxed=False)
        try:
            if good:
                asyncio.run(check(settings, launcher))
            else:
                with pytest.raises(ConfigError) as found:
                    asyncio.run(check(settings, launcher))
                assert found.value.message.startswith(f"--preload: programs cannot import {name!r}: ")
                assert says in found.value.message and "--python" in str(found.value.hint)
        finally:
            launcher.close()


@pytest.mark.parametrize("language", ["python", "bash"])
def test_without_a_sandbox_only_if_told(serving: Serving, language: str) -> None:
    server = serving.start(sandboxed=False, warm=1)
    assert server.health()["sandboxed"] is False
    code = {
        "python": "print(input())",
        "bash": "read x; echo $x",
    }
    assert server.printed(code[language], language, stdin="in\n") == "in\n"


def test_without_a_sandbox_a_deadline_still_holds(serving: Serving) -> None:
    server = serving.start(sandboxed=False, warm=0)
    before = set(descendants())
    found = server.run("import subprocess; subprocess.run(['sleep', '61'])", run_timeout=0.5)
    assert found["run_result"]["status"] == "TimeLimitExceeded"
    assert set(descendants()) <= before


def test_sixteen_clients_at_once(serving: Serving) -> None:
    server = serving.start(max_running=16, warm=8)
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        texts = list(threads.map(lambda n: server.printed(f"print({n} * 2)"), range(64)))
    assert texts == [f"{2 * n}\n" for n in range(64)]
    assert server.app.state.runner.pool.live <= 24


def test_a_start_that_fails_is_a_503_and_the_next_may_succeed(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serving.start(warm=0)
    start = Worker.start

    async def fails(self: Worker) -> None:
        raise ToolError("a sandbox did not start: no space")

    monkeypatch.setattr(Worker, "start", fails)
    answer = server.post("/run_code", {"code": "print(1)"})
    assert answer.status_code == 503
    assert answer.json()["status"] == "SandboxError"
    assert "no space" in answer.json()["message"]
    monkeypatch.setattr(Worker, "start", start)
    assert server.printed("print(1)") == "1\n"
    assert server.app.state.runner.pool.live == 0


def test_a_waiting_sandbox_that_was_killed_is_replaced(serving: Serving) -> None:
    """By the kernel, when memory is short: it is not the program's fault."""
    server = serving.start(warm=2)
    server.printed("print(1)")
    server.wait_for("idle", 2)
    for worker in list(server.app.state.runner.pool._idle):
        os.kill(worker.init, 9)
    assert [server.printed("print(1)") for _ in range(3)] == ["1\n"] * 3


def test_a_sandbox_that_ends_before_its_program_is_not_the_programs_fault(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serving.start(warm=1)
    server.wait_for("idle", 1)
    send = Worker.send

    def killed(self: Worker, job: dict[str, Any]) -> None:
        os.kill(self.init, 9)
        send(self, job)

    monkeypatch.setattr(Worker, "send", killed)
    answer = server.post("/run_code", {"code": "print(1)"})
    assert (answer.status_code, answer.json()["status"]) == (503, "SandboxError")


def test_failures_to_start_leave_no_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SandboxSettings(**SMALL)
    launcher = Bubblewrap(settings)

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("no more processes")

    async def starts() -> None:
        pool = Pool(settings, launcher, None)
        with pytest.raises(ToolError, match="no more processes"):
            await pool.take()
        await pool.close()

    before = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(subprocess, "Popen", fails)
    for _ in range(3):
        asyncio.run(starts())
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    launcher.close()


def test_cgroups_hold_memory_processes_and_cpu(tmp_path: Path) -> None:
    """In a folder of plain files: what is written, where."""
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    (tmp_path / "cgroup.subtree_control").touch()
    settings = SandboxSettings(max_processes=10, cpus=0.5, cgroup=str(tmp_path))
    groups = find_cgroups(settings)
    assert isinstance(groups, Cgroups)
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory +pids +cpu"
    group = groups.add(1234)
    group.limit_memory(1000)
    folder = next(path for path in tmp_path.glob("agentloop-sandbox-*/*") if path.is_dir())
    written = {path.name: path.read_text() for path in folder.iterdir()}
    assert written == {
        "pids.max": "12",
        "cpu.max": "50000 100000",
        "cgroup.procs": "1234",
        "memory.max": "1000",
        "memory.swap.max": "0",
        "memory.oom.group": "1",
    }
    assert not group.out_of_memory
    (folder / "memory.events").write_text("low 0\noom 1\noom_kill 1\n")
    assert group.out_of_memory
    group.kill()
    assert (folder / "cgroup.kill").read_text() == "1"


def test_cgroups_that_cannot_be_used_are_refused_only_if_named(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu\n")
    with pytest.raises(ConfigError, match="lacks the controllers memory, pids"):
        find_cgroups(SandboxSettings(cgroup=str(tmp_path)))
    assert find_cgroups(SandboxSettings(cgroup="off")) is None


def test_the_temporary_folder_is_removed() -> None:
    before = set(Path("/tmp").glob("agentloop-sandbox-*"))
    launcher = Bubblewrap(SandboxSettings())
    assert set(Path("/tmp").glob("agentloop-sandbox-*")) - before
    launcher.close()
    assert set(Path("/tmp").glob("agentloop-sandbox-*")) <= before


@pytest.mark.parametrize("what", ["hosts", "init.pyc", "empty", "."])
def test_a_server_whose_temporary_files_were_removed_goes_on(serving: Serving, what: str) -> None:
    """Machines clean /tmp of what nobody has used for days."""
    sandbox = serving.start(warm=0)
    launcher = sandbox.app.state.runner.pool._launcher
    removed = launcher._folder / what
    shutil.rmtree(removed) if removed.is_dir() else removed.unlink()
    assert sandbox.printed("print(6 * 7)") == "42\n"
    assert launcher._folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_somebody_else_has_put_there_is_not_used(serving: Serving) -> None:
    sandbox = serving.start(warm=0)
    folder = sandbox.app.state.runner.pool._launcher._folder
    shutil.rmtree(folder)
    folder.mkdir()
    folder.chmod(0o777)
    assert sandbox.post("/run_code", {"code": "1", "language": "python"}).status_code == 503
