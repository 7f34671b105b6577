"""The limit of open files is raised, and connections stay below it."""

from __future__ import annotations

import asyncio
import resource
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from agentloop.agent.rollout import rollout
from agentloop.client import open_files
from agentloop.client.connections import ConnectionPool
from agentloop.client.open_files import most_connections, shortage
from agentloop.errors import ModelError


@pytest.fixture
def few_files() -> Iterator[int]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = open_files._open() + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, before[1]))
    yield few
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_connections_take_half_of_the_files_that_are_left(few_files: int) -> None:
    assert 8 <= most_connections(1000) <= 10
    assert most_connections(3) == 3
    assert shortage(3) is None
    said = shortage(1000)
    assert said is not None and f"only {few_files} files may be open (`ulimit -n`)" in said
    assert "instead of 1000" in said and "`ulimit -n 4000`" in said


def test_a_limit_that_is_used_up_leaves_one(few_files: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "_open", lambda: few_files + 10)
    assert most_connections(1000) == 1


@pytest.mark.parametrize("hard", [300, 512])
def test_the_soft_limit_becomes_the_hard_one(hard: int) -> None:
    code = f"""
    import resource
    from agentloop.client.open_files import raise_limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, {hard}))
    raise_limit()
    print(resource.getrlimit(resource.RLIMIT_NOFILE))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert run.stdout == f"({hard}, {hard})\n"


async def test_many_requests_need_few_files(few_files: int) -> None:
    """100 requests at once: without a bound the 21st fails with "too many open files"."""
    at_once: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            at_once.append(open_files._open())
            await asyncio.sleep(0.001)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(serve(reader, writer))
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

    server = await asyncio.start_server(served, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    pool = ConnectionPool(1000)
    try:
        request = httpx.Request("GET", f"http://127.0.0.1:{port}/")
        answers = await asyncio.gather(*(pool.handle_async_request(request) for _ in range(100)))
        assert [answer.content for answer in answers] == [b"ok"] * 100
        assert max(at_once) <= few_files
    finally:
        await pool.aclose()
        server.close()
        await asyncio.sleep(0.01)


def test_the_programs_raise_the_limit(tmp_path: Path) -> None:
    code = """
    import resource, sys
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 512))
    sys.argv = ["agentloop", "--help"]
    from {module} import main
    try:
        main()
    except SystemExit:
        print("limit", resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    """
    for module in ("agentloop.commands.main", "rollout_server.__main__"):
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code.format(module=module))],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
        )
        assert "limit 512" in run.stdout


async def test_rollout_says_that_few_requests_run_at_once(few_files: int, tmp_path: Path) -> None:
    episodes = rollout("http://127.0.0.1:9", [], model=tmp_path / "none", max_in_flight=1000)
    few = "requests are in flight at once instead of 1000"
    with pytest.warns(UserWarning, match=few), pytest.raises(ModelError):
        await anext(episodes)
