"""Evaluations between steps and in the background: what runs, what is kept and written, and when."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import pytest

from agentloop.config import Recipe
from agentloop.errors import RunError
from agentloop.trace.store import TraceStore
from agentloop.types import EpisodeStatus, Span, Task, Trajectory
from trainer.console.console import Console
from trainer.run.evaluation import Evaluation, max_in_flight
from trainer.run.rundir import RunDir
from trainer.run.traces import RunTraces

TASKS = [Task(str(i), "a", [], data_source="odd" if i % 2 else "even") for i in range(5)]


class Runner:
    """Episodes that wait for `go` and record the version that sampled them."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.go.set()
        self.version = 0
        self.at_once = self.most_at_once = 0
        self.seen: list[tuple[str, str, int, float]] = []
        self.fail: set[str] = set()
        self.attributes: dict[str, bool] = {}  # of the tool call that fails them

    async def run(self, task: Task, *, group_id: str, sample_index: int, sampling: Any, seed: Any) -> list[Trajectory]:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.seen.append((task.task_id, group_id, sample_index, sampling.temperature))
        try:
            for _ in range(3 * len(TASKS) - 3 * int(task.task_id)):  # the first rows end last
                await asyncio.sleep(0)
            await self.go.wait()
        finally:
            self.at_once -= 1
        made = Trajectory(
            [1, 2], [0, 1], [None, -1.0], [None, self.version], 1, task_id=task.task_id, group_id=group_id
        )
        made.sample_index, made.data_source, made.reward = sample_index, task.data_source, float(task.task_id == "1")
        if task.task_id in self.fail:
            made.status, made.error, made.reward = EpisodeStatus.FAILED, "tool server gone", None
            made.spans = [Span("tool", "1", None, 0, 1, attributes={"tool": "search", **self.attributes})]
        return [made]


class Setting:
    def __init__(self, folder: Path, **config: Any) -> None:
        self.recipe = Recipe.model_validate(
            {
                "run": {"steps": 7},
                "model": {"path": "m"},
                "data": {"train": "d"},
                "rollout": {"max_concurrent": 8},
                "eval": {"every": 3, "sampling": {"temperature": 0.25}, **config},
            }
        )
        self.runner = Runner()
        self.dir = RunDir(folder)
        self.lines: list[dict[str, Any]] = []
        self.traces = RunTraces(folder, self.recipe.trace, seed=0, total_steps=7, notice=pytest.fail)
        self.evaluation = Evaluation(
            self.recipe, self.runner, TASKS, self.dir, Console(io.StringIO(), terminal=False), total_steps=7,
            record=self.record, traces=self.traces,
        )  # fmt: skip

    def record(self, metrics: dict[str, Any], *, amend: bool = False) -> None:
        self.lines.append(metrics)
        self.dir.root.mkdir(exist_ok=True)
        (self.dir.amend_metrics if amend else self.dir.append_metrics)(metrics)

    def trace(self, step: int) -> list[tuple[str, int]]:
        records = TraceStore(self.dir.root).records(step, "eval")
        assert all(record.version == step for record in records)
        return [(record.trajectory.task_id, record.trajectory.sample_index) for record in records]


def test_the_steps_that_are_evaluated(tmp_path: Path) -> None:
    assert [step for step in range(1, 8) if Setting(tmp_path).evaluation.due(step)] == [3, 6, 7]
    assert [Setting(tmp_path).evaluation.due_first(step) for step in (0, 3)] == [True, False]
    off = Setting(tmp_path, every=None, before_train=False).evaluation
    assert not [step for step in range(1, 8) if off.due(step)] and not off.due_first(0)
    only = Setting(tmp_path, only=True, before_train=False).evaluation
    assert only.due_first(0) and only.due_first(3), "also that of a run which is resumed"


def test_there_are_connections_for_both(tmp_path: Path) -> None:
    assert max_in_flight(Setting(tmp_path).recipe) == 8
    assert max_in_flight(Setting(tmp_path, max_concurrent=20).recipe) == 20
    assert max_in_flight(Setting(tmp_path, background=True).recipe) == 8 + 2
    assert max_in_flight(Setting(tmp_path, background=True, max_concurrent=5).recipe) == 8 + 5


async def test_every_row_is_run_n_times_with_the_sampling_of_evaluations(tmp_path: Path) -> None:
    setting = Setting(tmp_path, n=2, max_concurrent=3, log_generations=3)
    metrics = await setting.evaluation.at(3, 3)
    assert sorted(setting.runner.seen) == [(str(i), f"e{i}", k, 0.25) for i in range(5) for k in range(2)]
    assert setting.runner.most_at_once == 3
    assert (metrics["step"], metrics["version"], metrics["eval/episodes"]) == (3, 3, 10)
    assert metrics["eval/reward_mean"] == metrics["eval/mean@2"] == metrics["eval/pass@2"] == 0.2
    assert metrics["eval/odd/reward_mean"] == 0.5 and metrics["eval/even/reward_mean"] == 0.0
    await setting.traces.settle()
    assert setting.trace(3) == [("0", 0), ("0", 1), ("1", 0)], "in the order of the rows, whichever ended first"
    assert metrics["eval/reward_mean"] == 0.2 and "eval/time_s" in metrics
    assert not setting.lines, "the numbers are part of the step's own line"


async def test_a_failed_episode_is_counted_and_too_many_end_the_run(tmp_path: Path) -> None:
    setting = Setting(tmp_path, log_generations=1)
    setting.runner.fail = {"1", "4"}
    metrics = await setting.evaluation.at(3, 3)
    assert (metrics["eval/failed"], metrics["eval/reward_mean"], metrics["eval/pass@1"]) == (2, 0.0, 0.0)
    await setting.traces.settle()
    assert [task for task, _ in setting.trace(3)] == ["0", "1", "4"], "failed episodes are kept beside the first"
    setting.runner.fail |= {"3"}
    with pytest.raises(RunError, match=r"3 of 5 episodes of an evaluation failed[\s\S]*row 4\): tool server gone"):
        await setting.evaluation.at(6, 6)
    await setting.traces.settle()
    assert [task for task, _ in setting.trace(6)] == ["0", "1", "3", "4"], "also of an evaluation that ends the run"


async def test_a_background_evaluation_says_which_versions_it_spans(tmp_path: Path) -> None:
    setting = Setting(tmp_path, background=True, max_concurrent=1)
    setting.runner.version = 3
    setting.runner.go.clear()
    assert await setting.evaluation.at(3, 3) == {}
    await asyncio.sleep(0)
    await setting.evaluation.settle(wait=False)
    assert not setting.lines, "it still runs, and the run goes on"
    setting.runner.version = 5
    setting.runner.go.set()
    await setting.evaluation.settle(wait=True)
    (line,) = setting.lines
    assert (line["step"], line["version"], line["eval/version_min"], line["eval/version_max"]) == (3, 3, 3, 5)
    assert "eval/time_s" not in line and line["eval/background_s"] >= 0


async def test_a_background_evaluation_ends_before_the_next_begins(tmp_path: Path) -> None:
    setting = Setting(tmp_path, background=True)
    setting.runner.go.clear()
    await setting.evaluation.at(3, 3)
    following = asyncio.create_task(setting.evaluation.at(6, 6))
    await asyncio.sleep(0.01)
    assert not following.done() and setting.runner.most_at_once == 2, "a quarter of the episodes in flight"
    setting.runner.go.set()
    await following
    assert [line["step"] for line in setting.lines] == [3]
    await setting.evaluation.settle(wait=True)
    assert [line["step"] for line in setting.lines] == [3, 6]


async def test_a_background_evaluation_that_failed_ends_the_run(tmp_path: Path) -> None:
    setting = Setting(tmp_path, background=True)
    setting.runner.fail = {"0", "1", "2"}
    await setting.evaluation.at(3, 3)
    with pytest.raises(RunError, match="3 of 5 episodes"):
        await setting.evaluation.settle(wait=True)


async def test_an_evaluation_without_a_tool_that_is_away_is_none(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    setting.runner.fail, setting.runner.attributes = {"1"}, {"unavailable": True}
    with pytest.raises(RunError, match=r"1 of 5 episodes .*; 1 of 1 episodes that called search failed because it was"):
        await setting.evaluation.at(3, 3)


async def test_a_background_evaluation_that_a_kill_took_is_begun_again(tmp_path: Path) -> None:
    setting = Setting(tmp_path, background=True)
    await setting.evaluation.before(4, 4)
    assert not setting.runner.seen, "nothing was due at that step"
    await setting.evaluation.before(3, 3)
    await setting.evaluation.settle(wait=True)
    assert [line["step"] for line in setting.lines] == [3]
    await setting.evaluation.before(3, 3)
    await setting.evaluation.settle(wait=True)
    assert len(setting.lines) == 1, "it was there"
    between = Setting(tmp_path)
    between.record({"step": 6, "reward/mean": 0.5})
    await between.evaluation.before(6, 6)
    assert [row["step"] for row in between.dir.read_metrics()] == [3, 6], "Ctrl-C came before its end"
    assert between.dir.read_metrics()[-1].keys() > {"reward/mean", "eval/reward_mean"}, "one line"
    await between.evaluation.before(0, 0)
    assert [line["step"] for line in between.lines] == [6, 6, 0]


async def test_closing_ends_running_episodes(tmp_path: Path) -> None:
    setting = Setting(tmp_path, background=True)
    setting.runner.go.clear()
    await setting.evaluation.at(3, 3)
    await asyncio.sleep(0)
    await setting.evaluation.close()
    assert setting.runner.at_once == 0 and not setting.lines
