"""Requests to a run over its socket: what is wrong is refused, and the run goes on."""

from __future__ import annotations

import asyncio
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from agentloop.errors import ConfigError, RunDirError, WorkerError
from trainer.locks import FileLock
from trainer.run.control import MOST_BYTES, SOCKET_FILE, ask, listening
from trainer.run.rundir import LOCK


async def echo(request: Mapping[str, Any]) -> Any:
    if request.get("wrong"):
        raise ConfigError("it is wrong", "right it")
    return dict(request)


async def asked(folder: Path, command: str, **arguments: Any) -> Any:
    return await asyncio.to_thread(ask, folder, command, **arguments)


async def test_answers_and_errors_cross_the_socket(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 40)
    folder.mkdir()
    (folder / SOCKET_FILE).symlink_to(tmp_path / "elsewhere")  # left by somebody: replaced
    async with listening(folder, {"echo": echo}, pytest.fail):
        assert stat.S_IMODE((folder / SOCKET_FILE).stat().st_mode) == 0o600
        assert await asked(folder, "echo", n=[1, 2]) == {"command": "echo", "n": [1, 2]}
        with pytest.raises(ConfigError, match="it is wrong") as refused:
            await asked(folder, "echo", wrong=True)
        assert refused.value.hint == "right it"
        with pytest.raises(WorkerError, match="does not know this request"):
            await asked(folder, "other")
    assert not (folder / SOCKET_FILE).exists()


async def test_what_is_not_a_request_is_closed_without_a_word_on_the_console(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with listening(tmp_path, {"echo": echo}, pytest.fail):
        for line in (b"x" * (2 * MOST_BYTES), b"\n", b"[1]\n", b'{"command": {}}\n', b"\xff\xfe\n"):
            reader, writer = await asyncio.open_unix_connection(str(tmp_path / SOCKET_FILE))
            writer.write(line)
            writer.write_eof()
            await reader.read()
            writer.close()
        with socket.socket(socket.AF_UNIX) as idle:
            idle.connect(str(tmp_path / SOCKET_FILE))
        assert await asked(tmp_path, "echo") == {"command": "echo"}
    assert caplog.text == ""


def test_a_run_that_does_not_listen(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="no run is going on"):
        ask(tmp_path, "status")
    lock = FileLock.take(tmp_path / LOCK)
    with pytest.raises(RunDirError, match="is starting or ending"):
        ask(tmp_path, "status")
    lock.release()


async def test_a_place_without_sockets_costs_a_warning_only(tmp_path: Path) -> None:
    (tmp_path / SOCKET_FILE).mkdir()
    warnings: list[str] = []
    async with listening(tmp_path, {"echo": echo}, warnings.append):
        pass
    assert len(warnings) == 1 and "cannot reach this run" in warnings[0]
