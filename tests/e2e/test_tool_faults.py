"""A retrieval server that is killed while a run trains: the run waits for it, or ends and says for what."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentloop.trace.store import TraceStore
from agentloop.types import EpisodeStatus
from tests.e2e.conftest import FINISHED_STEPS, Background, Run
from tests.tools.search.support import silent, write_corpus
from tools.search.index.bm25 import Bm25Builder
from tools.search.index.building import build_index

TOOL = '''
import asyncio
from pathlib import Path

from tools.calculator import Calculator
from tools.search import SearchTool

QUERY = {"properties": {"query": {"type": "string"}}}


class Lookup(Calculator):
    """The calculator of the quickstart, which searches for each expression before it computes it.

    From call number `HOLD` on it waits for the file `go`; `waits` is there as soon as it does.
    """

    own_time_limit = True
    calls = 0

    def __init__(self, config, schema):
        super().__init__({}, schema)
        search = {"type": "function", "function": {"name": self.name, "parameters": QUERY}}
        self.search = SearchTool(config, search)

    async def execute(self, state, arguments, **kwargs):
        self.calls += 1
        while self.calls > HOLD and not Path("go").exists():
            Path("waits").touch()
            await asyncio.sleep(0.02)
        found = await self.search.execute(id(arguments), {"query": "road of 1488"})
        assert "Iowa Highway 17" in found.text, found
        return await super().execute(state, arguments, **kwargs)
'''


class Served:
    """`agentloop search serve` on one port, over a few passages."""

    def __init__(self, folder: Path) -> None:
        self._index = folder / "index"
        build_index(write_corpus(folder / "corpus.jsonl"), self._index, Bm25Builder(), progress=silent)
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = int(sock.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}/retrieve"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        words = ["search", "serve", str(self._index), "--port", str(self.port)]
        self._process = subprocess.Popen([sys.executable, "-m", "agentloop", *words], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self.url in self._process.stdout.readline()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    found = Served(tmp_path)
    found.start()
    yield found
    found.kill()


def tools_of(folder: Path, repo: Path, served: Served, *, hold: int, **config: Any) -> str:
    """Return the override for the tool that searches, and from call number `hold` on waits for `go`."""
    (folder / "lookup.py").write_text(TOOL.replace("HOLD", str(hold)))
    own = (repo / "recipes/quickstart/tools.yaml").read_text()
    own = own.replace("tools.calculator.Calculator", "./lookup.py:Lookup")
    own = own.replace("{type: native}", json.dumps({"retrieval_service_url": served.url, **config}))
    (folder / "lookup.yaml").write_text(own)
    return f"tools={folder}/lookup.yaml"


def wait_for(run: Background, file: Path) -> None:
    deadline = time.monotonic() + 120
    while not file.exists():
        assert run.process.poll() is None, run.process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if not k.endswith(("time_s", "tokens_per_s", "wait_s")) and "lag" not in k}


def episodes(run: Run, step: int) -> list[tuple[Any, ...]]:
    keys = ("group_id", "sample_index", "token_ids", "logprobs", "versions", "reward", "status", "stop_reason")
    return [tuple(line[key] for key in keys) for line in run.trace(step)]


def test_a_killed_retrieval_server_costs_a_run_nothing_but_time(
    background: Any, finished: Run, served: Served, repo: Path, tmp_path: Path
) -> None:
    """Its steps are those of the run whose tool needs no server: nothing failed, nothing was scored otherwise."""
    run = background(
        f"run.steps={FINISHED_STEPS}", tools_of(tmp_path, repo, served, hold=6),
        "agents.tool_agent.episode_timeout_s=60",
    )  # fmt: skip
    wait_for(run, tmp_path / "waits")
    served.kill()
    (tmp_path / "go").touch()
    served.start()
    code, out = run.finish()
    assert code == 0, out
    assert f"calculator at {served.url} is away (ConnectError" in out and "answers again" in out
    ended = Run(code, out, "", run.dir)
    assert [without_times(row) for row in ended.metrics] == [without_times(row) for row in finished.metrics]
    for step in range(1, FINISHED_STEPS + 1):
        assert episodes(ended, step) == episodes(finished, step)


def test_a_retrieval_server_that_stays_away_ends_the_run_and_is_named(
    background: Any, served: Served, repo: Path, tmp_path: Path
) -> None:
    """A quarter of the episodes call the tool: the others alone must not be trained on."""
    run = background(
        "run.steps=3",
        "eval.before_train=false",
        "eval.every=null",
        tools_of(tmp_path, repo, served, hold=1, outage_s=0.5),
    )
    wait_for(run, tmp_path / "waits")
    served.kill()
    (tmp_path / "go").touch()
    code, out = run.finish()
    assert code == 1 and "Traceback" not in out, out
    assert f"calculator at {served.url} has been unavailable for" in out and "last error: ConnectError" in out
    assert "episodes that called calculator failed because it was away" in out and "--resume" in out

    records = TraceStore(run.dir).records(1, "train")
    away = [record.trajectory for record in records if record.trajectory.error]
    assert away and all("ToolUnavailable: calculator at" in str(each.error) for each in away)
    assert {(each.status, each.reward) for each in away} == {(EpisodeStatus.FAILED, None)}
    metrics = run.dir / "metrics.jsonl"
    assert not metrics.exists() or "reward/mean" not in metrics.read_text(), "the step was not trained on"
