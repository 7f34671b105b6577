"""`agentloop search`: an index from the command line, served by a real process that dies and returns."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import typer
from typer.testing import CliRunner

from agentloop.errors import ConfigError, ToolError
from agentloop.tool.session import Toolset
from agentloop.types import Task, ToolCall
from tests.tools.search.support import PASSAGES, write_corpus
from tools.search import SearchTool, commands


def run(*words: str) -> str:
    app = typer.Typer()
    commands.register(app)
    result = CliRunner().invoke(app, ["search", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@contextmanager
def server(index: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    program = [sys.executable, "-m", "agentloop", "search", "serve", str(index), "--port", str(port)]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert re.fullmatch(rf"6 passages \(bm25\) at http://127.0.0.1:{port}/retrieve\n", line), line
        yield process
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_an_index_is_built_and_wrong_options_are_named(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c")
    assert re.match(r"6 passages -> .*/i in ", run("index", str(corpus), "--out", str(tmp_path / "i")))
    for words, says in (
        (["--kind", "bm52"], "did you mean 'bm25'"),
        (["--kind", "flat"], "needs an encoder"),
        (["--formula", "luecene"], "did you mean 'lucene'"),
    ):
        with pytest.raises(ConfigError, match=says):
            run("index", str(corpus), "--out", str(tmp_path / "j"), *words)
    for words in (["--encoder", "e"], ["--lists", "5"], ["--pooling", "cls"], ["--device", "cuda"]):
        with pytest.raises(ConfigError, match=f"{words[0]} has no effect: --kind is bm25"):
            run("index", str(corpus), "--out", str(tmp_path / "j"), *words)
    for words in (["--k1", "0.5"], ["--b", "0.5"], ["--formula", "okapi"], ["--lists", "5"]):
        with pytest.raises(ConfigError, match=f"{words[0]} has no effect: --kind is flat"):
            run("index", str(corpus), "--out", str(tmp_path / "j"), "--kind", "flat", "--encoder", "e", *words)
    for words in (["--encoder", "e"], ["--nprobe", "4"], ["--ef-search", "4"], ["--gpu"], ["--device", "cuda"]):
        with pytest.raises(ConfigError, match=f"{words[0]} has no effect: .* is an index of bm25"):
            run("serve", str(tmp_path / "i"), "--port", "0", *words)
    for name in ("c", "c.csv"):  # by what it holds, by its name
        (tmp_path / "c.csv").write_text("id,text\n")
        with pytest.raises(ConfigError, match=f"/{name} is a corpus, not an index") as caught:
            run("serve", str(tmp_path / name), "--port", "0")
        assert "agentloop search index" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="does not exist"):
        run("serve", str(tmp_path / "none"), "--port", "0")
    with pytest.raises(ConfigError, match="--token-file"):
        run("serve", str(tmp_path / "i"), "--host", "::", "--port", "0", "--token-file", str(tmp_path / "none"))


def test_a_corpus_that_changes_while_it_is_served_does_not_end_the_server(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "c")
    run("index", str(corpus), "--out", str(tmp_path / "i"))
    content, port = corpus.read_bytes(), free_port()
    with server(tmp_path / "i", port) as process, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:

        def ask(query: str) -> httpx.Response:
            return client.post("/retrieve", json={"queries": [query]})

        corpus.write_bytes(b"")
        for changed in (ask("lobbyist"), client.get("/health")):
            assert changed.status_code == 500
            assert changed.json()["error"] == f"the corpus {corpus} has changed since its index was built"
            assert "build the index again" in changed.json()["fix"]
        corpus.write_bytes(content)
        assert ask("lobbyist").status_code == client.get("/health").status_code == 200
        assert process.poll() is None


async def test_a_server_that_is_killed_during_calls_is_waited_for(tmp_path: Path) -> None:
    run("index", str(write_corpus(tmp_path / "c")), "--out", str(tmp_path / "i"))
    port = free_port()
    url = f"http://127.0.0.1:{port}/retrieve"
    config = {"retrieval_service_url": url, "retries": 1, "outage_s": 60, "topk": 1}
    tool = SearchTool(config, SearchTool.default_schema)
    toolset = Toolset([tool])

    async def search() -> str:
        call = ToolCall("search", {"query_list": ["lobbyist for Genentech"]})
        return (await toolset.session(Task("0", "a", [])).call(call, 1.0)).text

    expected = f'Doc 1 (Title: "{PASSAGES[4][0]}")\n{PASSAGES[4][1]}'
    with server(tmp_path / "i", port) as process:
        assert await search() == expected
        process.send_signal(signal.SIGKILL)
        process.wait()
        waiting = [asyncio.create_task(search()) for _ in range(20)]
        await asyncio.sleep(0.3)
        assert not any(task.done() for task in waiting)
    with server(tmp_path / "i", port):
        assert set(await asyncio.gather(*waiting)) == {expected}
        async with httpx.AsyncClient() as client:
            metrics = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
        assert 'search_requests_total{status="200"} 20.0' in metrics

    tool._client._outage_s = 0.01
    with pytest.raises(ToolError) as caught:
        for _ in range(3):
            await search()
    assert f"search at {url} has been unavailable for" in caught.value.message
    assert "ConnectError: cannot connect" in caught.value.message
    await tool._client.close()
