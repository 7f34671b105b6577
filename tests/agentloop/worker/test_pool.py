"""A pool of real workers: where episodes run, and what happens when a worker dies."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from agentloop.config import Recipe, SamplingConfig
from agentloop.errors import ConfigError, WorkerError
from agentloop.types import EpisodeStatus, Task, Trajectory
from agentloop.worker.pool import WorkerPool

AGENT = """
import asyncio, os, signal, time
from pathlib import Path

from agentloop.agent.base import AgentLoop
from agentloop.client.rate_limit import RateLimit

ONE_AT_A_TIME = RateLimit(None, 1, name="one at a time")


class Own(AgentLoop):
    async def run(self, episode):
        extra = episode.task.extra_info
        folder = Path(extra["folder"])
        name = f"{episode.group_id}-{episode.sample_index}"
        with (folder / "begun").open("a") as file:
            file.write(f"{name} {os.getpid()}\\n")
        if extra.get("deadly"):
            os.kill(os.getpid(), signal.SIGKILL)
        if extra.get("odd"):
            episode.turns.append(None)
        if extra.get("cancels"):
            asyncio.current_task().cancel()
            await asyncio.sleep(0)
        if extra.get("leaves"):
            # Its child has every file of the worker, the connection to the main process too.
            if os.fork() == 0:
                while not (folder / "go").exists():
                    time.sleep(0.1)
                os._exit(0)
            print("last words")
            os.kill(os.getpid(), signal.SIGKILL)
        if extra.get("tells"):
            import tomllib
            (folder / "told").write_text(repr((self.options, os.environ.get("PYTHONPATH"), tomllib.__file__)))
        if extra.get("raises"):
            raise ValueError("an own mistake")
        if extra.get("blocks"):
            time.sleep(0.3)
        try:
            while extra.get("waits") and not (folder / "go").exists():
                await asyncio.sleep(0.01)
        finally:
            (folder / f"left-{name}").touch()
        if extra.get("limited"):
            async with ONE_AT_A_TIME.slot(episode):
                with (folder / "limited").open("a") as file:
                    file.write("in ")
                    file.flush()
                    await asyncio.sleep(0.005)
                    file.write("out ")
"""

ENDED = EpisodeStatus.REJECTED
"""Of an episode that came to its end: the agent samples nothing, so nothing of it can be trained."""

Make = Callable[..., contextlib.AbstractAsyncContextManager["Running"]]


class Running:
    """A pool that serves, with what it reported."""

    def __init__(self, pool: WorkerPool, folder: Path, warnings: list[str]) -> None:
        self.pool = pool
        self.folder = folder
        self.warnings = warnings
        self.faults: list[tuple[str, str, str]] = []

    def task(self, name: str, **extra: Any) -> Task:
        prompt: Any = [{"role": "user", "content": f"the row {name}"}]
        return Task(name, "own", prompt, extra_info={"folder": str(self.folder), **extra})

    async def run(self, task: Task, group: str, sample: int = 0) -> Trajectory:
        (found,) = await self.pool.run(
            task, group_id=group, sample_index=sample, sampling=SamplingConfig(), seed=3
        )  # fmt: skip
        return found

    def begun(self) -> list[tuple[str, int]]:
        """Name and process of each episode, each time it began."""
        file = self.folder / "begun"
        lines = file.read_text().splitlines() if file.exists() else []
        return [(line.split()[0], int(line.split()[1])) for line in lines]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():  # noqa: ASYNC110  # other processes set no event
                await asyncio.sleep(0.01)


@pytest.fixture
def make(tmp_path: Path, quickstart_model: Path) -> Make:
    """Pools of an agent whose file has this source; keywords are of `cluster.agents`."""

    @contextlib.asynccontextmanager
    async def pool(source: str = AGENT, options: dict[Any, Any] | None = None, **agents: Any) -> AsyncIterator[Running]:
        file = tmp_path / "own.py"
        file.write_text(source)
        recipe = Recipe.model_validate(
            {
                "run": {"steps": 1},
                "model": {"path": str(quickstart_model)},
                "data": {"train": "unused.jsonl", "default_agent": "own"},
                "agents": {"own": {"class": f"{file}:Own", "options": options or {}}},
                "cluster": {"agents": {"workers": 2, **agents}},
            }
        )
        warnings: list[str] = []
        async with WorkerPool(recipe, str(quickstart_model), log_dir=tmp_path / "logs", warn=warnings.append) as made:
            running = Running(made, tmp_path, warnings)
            await made.serve(
                "http://127.0.0.1:9",
                token=None,
                context_length=256,
                max_in_flight=8,
                on_fault=lambda fault, row, episode: running.faults.append((fault.error, row, episode)),
            )
            yield running

    return pool


async def test_episodes_run_in_the_workers_and_those_of_a_row_together(make: Make) -> None:
    async with make() as running:
        tasks = [running.task(f"row{number}", limited=True) for number in range(4)]
        found = await asyncio.gather(
            *(running.run(task, f"g{number}", sample) for number, task in enumerate(tasks) for sample in range(3))
        )
        assert [(t.reward, t.status, t.task_id, t.sample_index) for t in found] == [
            (None, ENDED, f"row{number}", sample) for number in range(4) for sample in range(3)
        ]
        assert found[0].messages[0]["content"] == "the row row0" and found[0].spans[0].name == "episode"
        places: dict[str, set[int]] = {}
        for name, process in running.begun():
            places.setdefault(name.split("-")[0], set()).add(process)
        assert all(len(processes) == 1 for processes in places.values())
        assert len(set.union(*places.values())) == 2 and os.getpid() not in set.union(*places.values())

        # A limit with a name is that of all workers together.
        assert (running.folder / "limited").read_text() == "in out " * 12

        # What user code raises reaches the main process; what blocks a worker is named.
        failed = await running.run(running.task("wrong", raises=True), "g8", 1)
        assert failed.status is EpisodeStatus.FAILED and "an own mistake" in str(failed.error)
        assert running.faults == [("ValueError: an own mistake", "wrong", "g8/1")]
        await running.run(running.task("slow", blocks=True), "g9")
        await running.until(lambda: bool(running.warnings))
        assert "own.py" in running.warnings[0] and "blocked the event loop" in running.warnings[0]
        assert running.pool.take_metrics()["workers/lag_max_s"] > 0.1

        # A cancelled episode ends in its worker.
        cancelled = asyncio.ensure_future(running.run(running.task("long", waits=True), "g10"))
        await running.until(lambda: "g10-0" in dict(running.begun()))
        cancelled.cancel()
        await running.until(lambda: (running.folder / "left-g10-0").exists())
        assert running.pool.restarts == 0
        workers = {process for _, process in running.begun()}
    assert not any(psutil.pid_exists(process) for process in workers)


async def test_a_killed_worker_costs_its_unfinished_episodes(make: Make) -> None:
    async with make() as running:
        tasks = [running.task(f"row{number}", waits=True) for number in range(6)]
        episodes = [asyncio.ensure_future(running.run(task, f"g{number}")) for number, task in enumerate(tasks)]
        await running.until(lambda: len(running.begun()) == 6)
        first = running.begun()
        victim = first[0][1]
        os.kill(victim, signal.SIGKILL)
        lost = {name for name, process in first if process == victim}
        await running.until(lambda: len(running.begun()) == 6 + len(lost))
        (running.folder / "go").touch()
        found = await asyncio.gather(*episodes)
        assert [(t.status, t.group_id) for t in found] == [(ENDED, f"g{n}") for n in range(6)]
        assert {name for name, _ in running.begun()[6:]} == lost
        (warning,) = running.warnings
        assert "was killed (SIGKILL" in warning and f"its {len(lost)} unfinished" in warning
        await running.until(lambda: running.pool.restarts == 1)

        # The new worker takes episodes again.
        await running.until(lambda: len(running.pool.processes()) == 2)
        more = [running.run(running.task(f"new{n}"), f"n{n}") for n in range(4)]
        assert all(t.status is ENDED for t in await asyncio.gather(*more))
        assert len({process for name, process in running.begun() if name[0] == "n"}) == 2


async def test_an_episode_that_ends_every_worker_fails_and_the_others_go_on(make: Make) -> None:
    async with make() as running:
        deadly = asyncio.ensure_future(running.run(running.task("deadly", deadly=True), "g0"))
        others = [running.run(running.task(f"row{number}", waits=True), f"g{number}") for number in range(1, 5)]
        waiting = asyncio.gather(*others)
        failed = await deadly
        assert failed.status is EpisodeStatus.FAILED and "alone" in str(failed.error) and len(failed) == 0
        assert (failed.task_id, failed.group_id, failed.agent_name) == ("deadly", "g0", "own")
        (running.folder / "go").touch()
        assert all(t.status is ENDED for t in await waiting)
        assert [name for name, _ in running.begun()].count("g0-0") >= 4
        assert any("row deadly, group g0, sample 0" in warning for warning in running.warnings)


async def test_workers_that_only_die_end_the_run(make: Make) -> None:
    async with make(workers=1, max_restarts=1) as running:
        waiting = asyncio.ensure_future(running.run(running.task("row", waits=True), "g0"))
        for deaths in (1, 2):
            await running.until(lambda: len(running.pool.processes()) == 1)
            (process,) = running.pool.processes()
            os.kill(process, signal.SIGKILL)
            await running.until(lambda deaths=deaths: len(running.warnings) == deaths)  # type: ignore[misc]
        with pytest.raises(WorkerError, match="died 2 times in a row"):
            await waiting
        with pytest.raises(WorkerError, match="died 2 times in a row"):
            await running.run(running.task("row"), "g1")


async def test_what_cannot_be_loaded_is_the_users_error(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"own\.py"):
        async with make("class Another:\n    pass\n", workers=1):
            pass


async def test_a_worker_that_dies_while_it_starts_shows_its_log(make: Make) -> None:
    with pytest.raises(WorkerError, match=r"agent worker 0 ended with exit code 5 while it started.*(?s:.)*the reason"):
        async with make("import os\nprint('the reason', flush=True)\nos._exit(5)\n", workers=1):
            pass


async def test_workers_join_and_leave(make: Make) -> None:
    async with make(workers=1) as running:
        episodes = [asyncio.ensure_future(running.run(running.task(f"row{n}", waits=True), f"g{n}")) for n in range(2)]
        await running.until(lambda: len(running.begun()) == 2)
        await running.pool.scale(3)
        await running.until(lambda: len(running.pool.processes()) == 3)
        episodes += [asyncio.ensure_future(running.run(running.task(f"new{n}", waits=True), f"n{n}")) for n in range(4)]
        await running.until(lambda: len({process for _, process in running.begun()}) == 3)

        # A worker that leaves ends its episodes first; those of one that dies meanwhile go elsewhere.
        await running.pool.scale(1)
        assert [state["state"] for state in running.pool.states()] == ["serving", "leaving", "leaving"]
        pids = [state["pid"] for state in running.pool.states()]
        os.kill(pids[2], signal.SIGKILL)
        await running.until(lambda: len(running.pool.states()) == 2)
        (running.folder / "go").touch()
        assert all(t.status is ENDED for t in await asyncio.gather(*episodes))
        await running.until(lambda: len(running.pool.states()) == 1)
        assert not psutil.pid_exists(pids[1]) and running.pool.processes() == [pids[0]]
        assert running.pool.restarts == 0


async def test_an_episode_that_cannot_be_read_or_run_costs_no_worker(make: Make) -> None:
    async with make() as running:
        found = await running.run(running.task("odd", odd=True), "g0")
        assert found.status is EpisodeStatus.FAILED and "at `turns[0]`" in str(found.error)
        found = await running.run(running.task("cancels", cancels=True), "g3")
        assert found.status is EpisodeStatus.FAILED and "though the run did not ask" in str(found.error)
        # What would end the run in the main process ends it here too, and is not waited for.
        with pytest.raises(WorkerError, match="row wrong, group g1, sample 0: KeyError: 'nobody'"):
            await running.run(running.task("wrong", interaction_kwargs={"name": "nobody"}), "g1")
        assert (await running.run(running.task("well"), "g2")).status is ENDED
        assert running.pool.restarts == 0 and not running.warnings


async def test_a_worker_that_dies_is_noticed_while_its_child_runs(make: Make) -> None:
    async with make(workers=1) as running:
        failed = await running.run(running.task("leaves", leaves=True), "g0")
        (running.folder / "go").touch()
        assert failed.status is EpisodeStatus.FAILED and "SIGKILL" in str(failed.error)
        assert "last words" in (running.folder / "logs/agent_worker0.log").read_text()
        await running.until(lambda: running.pool.processes() != [])
        assert (await running.run(running.task("well"), "g1")).status is ENDED


async def test_modules_options_and_variables_are_those_of_the_main_process(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that comes first in `sys.path` here does so there, even before the standard library's."""
    own = tmp_path / "first"
    own.mkdir()
    (own / "tomllib.py").touch()
    monkeypatch.setenv("PYTHONPATH", "for programs of tools")
    monkeypatch.syspath_prepend(own)
    async with make(options={"by_size": {1: datetime.date(2026, 1, 2)}}) as running:
        await running.run(running.task("row", tells=True), "g0")
        told = (running.folder / "told").read_text()
    assert told == repr(({"by_size": {1: datetime.date(2026, 1, 2)}}, "for programs of tools", str(own / "tomllib.py")))


async def test_a_worker_that_is_killed_while_it_starts_is_started_again(make: Make, tmp_path: Path) -> None:
    once = f"""
import os, signal
from pathlib import Path
if not Path({str(tmp_path / "once")!r}).exists():
    Path({str(tmp_path / "once")!r}).touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    async with make(once + AGENT, workers=1) as running:
        assert (await running.run(running.task("row"), "g0")).status is ENDED
        assert running.pool.restarts == 1
        assert running.warnings == [
            "agent worker 0 was killed (SIGKILL; by the kernel if memory ran out) while it started; it is started again"
        ]


async def test_episodes_that_run_at_the_end_are_cancelled(make: Make) -> None:
    async with make(workers=1) as running:
        waiting = asyncio.ensure_future(running.run(running.task("long", waits=True), "g0"))
        await running.until(lambda: len(running.begun()) == 1)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert (running.folder / "left-g0-0").exists()
    with pytest.raises(WorkerError, match="have ended"):
        await running.run(running.task("row"), "g1")


async def test_a_worker_that_is_stopped_while_it_starts_is_started_again(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentloop.runtime.child.STOPPED_S", 1.0)
    once = f"""
import os, signal
from pathlib import Path
if not Path({str(tmp_path / "once")!r}).exists():
    Path({str(tmp_path / "once")!r}).touch()
    os.kill(os.getpid(), signal.SIGSTOP)
"""
    async with make(once + AGENT, workers=1) as running:
        assert (await running.run(running.task("row"), "g0")).status is ENDED
        assert running.pool.restarts == 1 and "was stopped for" in running.warnings[0]
