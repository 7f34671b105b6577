"""`agentloop trace serve` as a process: it says where it is, and ends with Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx


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
        assert len(token) >= 32
        assert httpx.get(url + "x").status_code == 401
        assert httpx.get(url + "x", headers={"Authorization": f"Bearer {token}"}).status_code == 404
