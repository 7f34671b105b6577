"""`agentloop trace serve` as a process: it says where it is, and ends with Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from agentloop.errors import TraceError
from tests.agentloop.commands.trace.support import command, write_run


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    command = [sys.executable, "-m", "agentloop", "trace", "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1)
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line.strip())
            if line.startswith("Ctrl-C"):
                break
        yield process, lines
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_it_prints_its_address_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    with serving(str(tmp_path / "none yet")) as (process, lines):
        assert lines[0].startswith("viewer: http://127.0.0.1:"), lines
        assert f"{tmp_path / 'none yet'} does not exist yet: waiting for it\n" in "\n".join([*lines, ""])
        url = lines[0].removeprefix("viewer: ")
        assert httpx.get(url + "health").json() == {"ok": True}
        with httpx.stream("GET", url + "api/events") as events:  # a page that is open
            assert next(events.iter_lines()).startswith("retry")
            process.send_signal(signal.SIGINT)
            process.wait(20)
        assert process.wait(20) == 0
        assert process.stdout is not None and process.stdout.read() == ""
    assert not (tmp_path / "none yet").exists()


def test_beyond_loopback_it_makes_a_token(tmp_path: Path) -> None:
    with serving(str(tmp_path), "--host", "0.0.0.0") as (_, lines):  # noqa: S104
        url, _, token = lines[0].removeprefix("viewer: ").partition("?token=")
        assert "127.0.0.1" not in "".join(lines), "it is copied to other machines"
        assert f"OTLP:   {url}v1/traces with the header authorization: Bearer {token}" in lines
        assert len(token) >= 32
        assert httpx.get(url + "x").status_code == 401
        assert httpx.get(url + "x", headers={"Authorization": f"Bearer {token}"}).status_code == 404


def test_the_token_of_a_file_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("x" * 40)
    (tmp_path / "token").chmod(0o600)
    with serving(str(tmp_path), "--token-file", str(tmp_path / "token")) as (_, lines):
        assert any(f"Bearer TOKEN, the content of {tmp_path}/token" in line for line in lines), lines
        assert "xxx" not in "".join(lines)


@pytest.mark.parametrize("part", ["traces", "traces/step_1", "traces/step_1/train.parquet"])
def test_of_a_part_of_a_run_the_run_is_served(tmp_path: Path, part: str) -> None:
    run = write_run(tmp_path / "small", steps=1)
    with serving(str(run / part)) as (_, lines):
        assert lines[0] == f"{run / part} is inside the run {run}, which is served"
        url = lines[1].removeprefix("viewer: ")
        assert [each["id"] for each in httpx.get(url + "api/runs").json()["runs"]] == ["small"]


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    refused = command("serve", tmp_path / "notes.txt")
    assert isinstance(refused.exception, TraceError) and refused.exception.message.endswith("notes.txt is a file")
