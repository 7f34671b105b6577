"""The two programs that use the library from Python run as a reader would run them."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentloop import AgentLoop, Episode, EpisodeStatus, rollout
from agentloop.config import AgentConfig, SamplingConfig
from agentloop.errors import ConfigError, ServerError
from tests.rollout_server.server import Server


@pytest.fixture(scope="module")
def url(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A rollout server with the quickstart's model."""
    server = Server(tmp_path_factory.mktemp("serve"), "--model", str(repo / "recipes/quickstart/model"))
    try:
        yield server.url
    finally:
        server.end()


def run(repo: Path, program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(repo / "recipes" / program), *arguments], capture_output=True, text=True, cwd=repo
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_one_page_trains_on_tokens_that_the_engine_sampled(repo: Path) -> None:
    out = run(repo, "one_page.py", "--steps", "3", "--prompts", "4")
    steps = re.findall(r"step +(\d+)  reward ([\d.]+)  episodes (\d+)  mismatch (\S+)", out)
    assert [(step, episodes) for step, _, episodes, _ in steps] == [("1", "32"), ("2", "32"), ("3", "32")]

    # After the first step the server samples from published weights: a mismatch would show there.
    assert all(0.0 <= float(reward) <= 1.0 and float(mismatch) < 1e-5 for _, reward, _, mismatch in steps)


def test_rollout_only_prints_each_episode(repo: Path, url: str) -> None:
    out = run(repo, "rollout_only.py", url)
    rows = re.findall(r"^row (\d): ok, reward [01]\.0, stop$", out, re.MULTILINE)
    assert sorted(rows) == sorted("01234567" * 2)
    assert out.count("What is") == 16


class Twice(AgentLoop):
    """Ask twice; a class that is not registered anywhere."""

    async def run(self, episode: Episode) -> None:
        await episode.generate()
        episode.observe({"role": "user", "content": "Once more."})
        await episode.generate()


class Breaks(AgentLoop):
    async def run(self, episode: Episode) -> None:
        await episode.generate()
        raise RuntimeError("the agent is broken")


async def test_a_class_runs_for_every_row(repo: Path, url: str) -> None:
    task = repo / "recipes/quickstart"
    episodes = rollout(
        url,
        f"{task}/data.py:val_rows",
        model=task / "model",
        agent=Twice,
        limits=AgentConfig(max_assistant_turns=2, max_response_tokens=64),
        sampling=SamplingConfig(max_new_tokens=16),
        max_rows=3,
    )
    finished = [episode[-1] async for episode in episodes]
    assert sorted(t.task_id for t in finished) == ["0", "1", "2"]
    assert all(t.status is EpisodeStatus.OK and len(t.turns) == 2 and t.reward == 0.0 for t in finished)


async def test_a_failing_agent_is_reported_and_ends_nothing(repo: Path, url: str) -> None:
    task = repo / "recipes/quickstart"
    rows, model = f"{task}/data.py:val_rows", task / "model"
    finished = [episode[-1] async for episode in rollout(url, rows, model=model, agent=Breaks, max_rows=2, samples=2)]
    assert [t.status for t in finished] == [EpisodeStatus.FAILED] * 4
    assert all("the agent is broken" in str(t.error) for t in finished)


async def test_leaving_early_cancels_what_runs(repo: Path, url: str) -> None:
    task = repo / "recipes/quickstart"
    rows, model = f"{task}/data.py:val_rows", task / "model"
    async with contextlib.aclosing(rollout(url, rows, model=model, tools=task / "tools.yaml", max_rows=40)) as episodes:
        async for _ in episodes:
            break
    left = [t for t in asyncio.all_tasks() if "EpisodeRunner.run" in repr(t.get_coro())]
    assert left == []


async def test_what_cannot_work_is_refused_with_its_reason(repo: Path, url: str, tmp_path: Path) -> None:
    task = repo / "recipes/quickstart"
    rows, model = f"{task}/data.py:val_rows", task / "model"
    with pytest.raises(ConfigError, match="'ftp://x' is not the address of a rollout server"):
        await anext(rollout("ftp://x", rows, model=model))
    with pytest.raises(ServerError, match="cannot be reached"):
        await anext(rollout("http://127.0.0.1:9", rows, model=model))
    with pytest.raises(ConfigError, match="max_in_flight is 0"):
        await anext(rollout(url, rows, model=model, max_in_flight=0))
