"""Admission: the staleness bound holds for any timing, and groups arrive in order."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from agentloop.config import RolloutConfig, SamplingConfig
from agentloop.errors import RunDirError
from agentloop.types import EpisodeStatus, Task, Trajectory
from trainer.rollouts.producer import Group, Producer

TASKS = [Task(task_id=str(i), agent_name="a", prompt=[]) for i in range(5)]
ROWS = [i % 5 for i in range(1000)]


class SlowRunner:
    """Episodes of random duration that record the version served at their start."""

    def __init__(self) -> None:
        self.version = 0
        self.began: dict[str, int] = {}
        self.at_once = 0
        self.most_at_once = 0
        self.closed = 0
        self.rng = random.Random(0)

    async def run(
        self, task: Task, *, group_id: str, sample_index: int, sampling: SamplingConfig, seed: int | None
    ) -> list[Trajectory]:
        self.began.setdefault(group_id, self.version)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(self.rng.random() * 0.003)
        finally:
            self.at_once -= 1
            self.closed += 1
        return [
            Trajectory([1, 2], [0, 1], [None, -1.0], [None, self.version], 1, task_id=task.task_id, group_id=group_id)
        ]


def make(runner: SlowRunner, **changes: Any) -> Producer:
    config = RolloutConfig(**{"group_size": 2, "batch_size": 3, "max_concurrent": 4, **changes})
    return Producer(runner, TASKS, ROWS, config, seed=0, total_steps=6)


@pytest.mark.parametrize("staleness", [0, 1, 3])
async def test_no_group_starts_more_versions_behind_than_allowed(staleness: int) -> None:
    runner = SlowRunner()
    producer = make(runner, max_staleness=staleness)
    producer.admit(0)
    for step in range(6):
        for group in range(step * 3, step * 3 + 3):
            await producer.take(group)
            assert step - runner.began[f"g{group}"] <= staleness
        await asyncio.sleep(0.002)  # the trainer is slow too
        runner.version += 1
        producer.admit(runner.version)
    assert len(runner.began) == 18
    if staleness:
        assert any(index // 3 > version for index, version in ((int(g[1:]), v) for g, v in runner.began.items()))


async def test_at_most_max_concurrent_episodes_run() -> None:
    runner = SlowRunner()
    producer = make(runner, max_staleness=5)
    producer.admit(0)
    for group in range(18):
        await producer.take(group)
    assert runner.most_at_once == 4


async def test_a_group_holds_the_row_that_its_index_names() -> None:
    producer = make(SlowRunner())
    producer.admit(0)
    groups = [await producer.take(index) for index in (2, 0, 1)]
    assert [group.task.task_id for group in groups] == ["2", "0", "1"]
    assert all(len(group.trajectories) == 2 for group in groups)


class ScoringRunner:
    """Rewards depend on the row: rows in `solved` always give 1, others alternate between 0 and 1."""

    def __init__(self, solved: set[str], failing: set[str] | None = None) -> None:
        self.solved = solved
        self.failing = failing or set()
        self.asked: list[tuple[str, str, int, float]] = []

    async def run(
        self, task: Task, *, group_id: str, sample_index: int, sampling: SamplingConfig, seed: int | None
    ) -> list[Trajectory]:
        self.asked.append((group_id, task.task_id, sample_index, sampling.temperature))
        await asyncio.sleep(0)
        reward = 1.0 if task.task_id in self.solved else float(sample_index % 2)
        failed = task.task_id in self.failing
        status = EpisodeStatus.FAILED if failed else EpisodeStatus.OK
        return [
            Trajectory([1, 2], [0, 1], [None, -1.0], [None, 0], 1, task_id=task.task_id, reward=reward, status=status)
        ]


MANY = [Task(task_id=str(i), agent_name="a", prompt=[]) for i in range(7)]


class Rows:
    def __getitem__(self, index: int) -> int:
        return index % 7


def scoring(runner: ScoringRunner, **options: Any) -> Producer:
    config = RolloutConfig(group_size=2, batch_size=3, max_concurrent=3)
    return Producer(runner, MANY, Rows(), config, seed=0, total_steps=1, **options)


async def test_a_group_without_variance_is_replaced_in_its_own_slot() -> None:
    results = []
    for _ in range(2):
        runner = ScoringRunner({"0", "2", "3"})
        producer = scoring(runner, replacements=2)
        producer.admit(0)
        results.append([await producer.take(index) for index in range(3)])
    for groups in results:
        # 1,000,003 is 4 modulo 7: the slots try rows 0 4, 1, and 2 6.
        assert [group.task.task_id for group in groups] == ["4", "1", "6"]
        assert [group.replaced for group in groups] == [1, 0, 1]
        assert not any(group.given_up for group in groups)
        assert [group.index for group in groups] == [0, 1, 2]
    assert {(name, row) for name, row, _, _ in runner.asked} >= {("g0", "0"), ("g0.1", "4"), ("g2.1", "6")}


async def test_replacing_is_bounded_and_a_failed_group_is_not_replaced() -> None:
    producer = scoring(ScoringRunner({"0", "4", "2", "6", "3"}, failing={"1"}), replacements=2)
    producer.admit(0)
    groups = [await producer.take(index) for index in range(3)]
    assert [(group.task.task_id, group.replaced, group.given_up) for group in groups] == [
        ("1", 2, False), ("1", 0, False), ("3", 2, True),
    ]  # fmt: skip
    # Slot 0 tries rows 0, 4 and 1, which fails: failures stay visible.


async def test_replacing_is_off_unless_asked_for() -> None:
    producer = scoring(ScoringRunner({"0", "1", "2"}))
    producer.admit(0)
    groups = [await producer.take(index) for index in range(3)]
    assert [(group.task.task_id, group.replaced, group.given_up) for group in groups] == [
        (row, 0, False) for row in "012"
    ]


async def test_the_greedy_episode_of_a_group_is_kept_apart() -> None:
    runner = ScoringRunner(set())
    ended: list[list[Trajectory]] = []
    producer = scoring(runner, greedy_baseline=True, on_episode=ended.append)
    producer.admit(0)
    group = await producer.take(0)
    assert len(group.episodes) == 2 and len(group.baseline) == 1
    assert [(i, temperature) for name, _, i, temperature in runner.asked if name == "g0"] == [
        (0, 1.0), (1, 1.0), (2, 0.0),
    ]  # fmt: skip
    await producer.close()
    assert not any(episode is group.baseline for episode in ended), "no episode of the step's count"
    assert not any(t is group.baseline[0] for t in group.trajectories)


async def test_close_ends_running_episodes() -> None:
    runner = SlowRunner()
    producer = make(runner)
    producer.admit(0)
    await asyncio.sleep(0)
    await producer.close()
    assert runner.at_once == 0


class SlowToolRunner:
    """Episodes of several turns with a tool between them; a few calls take many steps of the trainer. Each token has
    the version that was served when it was sampled, so that one episode spans several."""

    def __init__(self, seed: int) -> None:
        self.version = 0
        self.finished: list[tuple[str, int]] = []
        self.rng = random.Random(seed)

    async def run(
        self, task: Task, *, group_id: str, sample_index: int, sampling: SamplingConfig, seed: int | None
    ) -> list[Trajectory]:
        versions: list[int | None] = [None]
        for _ in range(self.rng.randint(1, 4)):
            versions += [self.version] * self.rng.randint(1, 3)
            for _ in range(60 if self.rng.random() < 0.1 else self.rng.randint(0, 5)):
                await asyncio.sleep(0)
        self.finished.append((group_id, sample_index))
        size = len(versions)
        return [
            Trajectory(
                list(range(size)), [0, *[1] * (size - 1)], [None, *[-1.0] * (size - 1)], versions, 1,
                task_id=task.task_id, group_id=group_id, sample_index=sample_index,
            )
        ]  # fmt: skip


@pytest.mark.parametrize("staleness", [0, 1, 2, 5])
@pytest.mark.parametrize("slow", ["trainer", "tool"])
async def test_no_token_is_older_than_allowed_and_nothing_finished_is_thrown_away(staleness: int, slow: str) -> None:
    runner = SlowToolRunner(seed=staleness)
    steps = 30
    config = RolloutConfig(group_size=3, batch_size=4, max_concurrent=7, max_staleness=staleness)
    producer = Producer(runner, TASKS, ROWS, config, seed=0, total_steps=steps)
    producer.admit(0)
    trained: list[tuple[str, int]] = []
    ages = []
    for step in range(steps):
        for index in range(step * 4, step * 4 + 4):
            group = await producer.take(index)
            for trajectory in group.trajectories:
                ages += [step - version for version in trajectory.versions if version is not None]
                trained.append((trajectory.group_id, trajectory.sample_index))
            for _ in range(40 if slow == "trainer" else 0):
                await asyncio.sleep(0)
        runner.version += 1
        producer.admit(runner.version)
    assert min(ages) >= 0 and max(ages) <= staleness
    assert max(ages) == staleness or slow == "tool", "what is allowed is used"
    assert sorted(trained) == sorted(runner.finished)
    assert len(trained) == len(set(trained)) == steps * 4 * 3


async def test_groups_that_were_finished_are_restored_and_others_start_again() -> None:
    runner = SlowRunner()
    producer = make(runner, max_staleness=3)
    producer.admit(0)
    for index in range(3):
        await producer.take(index)
    runner.version = 1
    producer.admit(1)
    taken = await producer.take(3)  # of the step that is under way
    for _ in range(2000):
        await asyncio.sleep(0.001)
        if len(producer.state()) >= 4:
            break
    kept = producer.state()
    await producer.close()
    assert kept[0] is taken and all(group.index >= 3 for group in kept)

    runner.began.clear()
    resumed = Producer(
        runner,
        TASKS,
        ROWS,
        RolloutConfig(group_size=2, batch_size=3, max_concurrent=4, max_staleness=3),
        seed=0,
        total_steps=6,
        first_step=1,
    )
    resumed.restore(kept)
    resumed.admit(1)
    again = [await resumed.take(index) for index in range(3, 15)]
    assert [group.index for group in again] == list(range(3, 15))
    assert all(again[group.index - 3] is group for group in kept)
    assert {int(name[1:]) for name in runner.began} == set(range(3, 15)) - {group.index for group in kept}


@pytest.mark.parametrize(("change", "key"), [({"group_size": 3}, "group_size"), ({"max_staleness": 1}, "staleness")])
async def test_restored_groups_that_do_not_fit_the_recipe_are_refused(change: dict[str, int], key: str) -> None:
    runner = SlowRunner()
    producer = make(runner, max_staleness=3)
    producer.admit(0)
    group = await producer.take(9)  # of step 3, sampled by version 0
    await producer.close()
    with pytest.raises(RunDirError, match=rf"(?s)group 9.*rollout\.(max_)?{key}.*groups file"):
        make(runner, **{"max_staleness": 3, **change}).restore([group])


async def test_a_restored_group_without_its_greedy_episode_is_refused_where_one_is_needed() -> None:
    group = Group(0, TASKS[0], [[], []])
    with pytest.raises(RunDirError, match=r"(?s)group 0.*no greedy episode.*trainer\.algorithm\.advantage"):
        scoring(ScoringRunner(set()), greedy_baseline=True).restore([group])
