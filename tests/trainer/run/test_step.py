"""Two training steps with real ranks and scripted episodes, for algorithms that use every part."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from agentloop.config import Recipe, SamplingConfig
from agentloop.types import StepReward, StopReason, Task, Trajectory, Turn
from tests.trainer.conftest import VOCAB, start_workers
from trainer.rollouts.producer import Producer
from trainer.run.step import PolicyState, StepTrainer, TrainedStep
from trainer.workers.group import WorkerGroup

TASKS = [Task(task_id=str(i), agent_name="a", prompt=[]) for i in range(5)]
LIMIT = 24


class Script:
    """Episodes of two turns with tool output between; all randomness derives from the episode's name."""

    async def run(
        self, task: Task, *, group_id: str, sample_index: int, sampling: SamplingConfig, seed: int | None
    ) -> list[Trajectory]:
        rng = np.random.default_rng([int(task.task_id), sample_index, *group_id.encode()])
        first, tool, second = (int(n) for n in rng.integers(2, 7, 3))
        mask = [0] * 6 + [1] * first + [0] * tool + [1] * second
        prompt = [int(task.task_id) + 1] * 6
        reward = 1.0 if task.task_id == "0" else float(rng.random() < 0.5)
        begin = 6 + first + tool
        trajectory = Trajectory(
            token_ids=prompt + rng.integers(0, VOCAB, len(mask) - 6).tolist(),
            loss_mask=mask,
            logprobs=[float(rng.normal(-4.5, 0.5)) if m else None for m in mask],
            versions=[0 if m else None for m in mask],
            prompt_length=6,
            turns=[Turn(6, 6 + first, "", StopReason.STOP), Turn(begin, len(mask), "", StopReason.STOP, order=1)],
            reward=reward,
            outcome=reward,
            step_rewards=[StepReward("tool", 0.1, 6, 6 + first)],
            agent_name="a",
        )
        return [trajectory]


class NoPublisher:
    """A publisher without a server: every version counts as served."""

    async def write(self, version: int) -> Path:
        raise AssertionError("a step publishes; only the start of a run writes")

    async def publish(self, version: int) -> float:
        return 0.0

    async def close(self) -> None: ...


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def workers(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[WorkerGroup]:
    """One group of two ranks with a critic for all tests: each call brings its own loss."""
    group = await start_workers(
        model_path=str(tiny_model),
        config=recipe_of({"advantage": "gae"}, critic={"optim": {"lr": 1e-2}}, ranks=2).trainer,
        dtype="float32",
        total_steps=100,
        seed=0,
        log_dir=tmp_path_factory.mktemp("logs"),
        reference=True,
    )
    yield group
    await group.close()


def recipe_of(algorithm: dict[str, Any], **trainer: Any) -> Recipe:
    if algorithm.get("advantage") == "gae":
        trainer = {"critic": {"critic_warmup": 1}} | trainer
    return Recipe.model_validate(
        {
            "run": {"steps": 2},
            "model": {"path": "tiny"},
            "data": {"train": "none.jsonl"},
            "agents": {"a": {"max_response_tokens": LIMIT}},
            "rollout": {"group_size": 4, "batch_size": 4},
            "trainer": {"algorithm": algorithm, "optim": {"lr": 1e-2}, "tokens_per_micro_batch": 64, **trainer},
        }
    )


async def two_steps(recipe: Recipe, workers: WorkerGroup) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the metrics of two training steps, and the warnings."""
    steps, warnings = await trained_steps(recipe, workers)
    return [step.metrics() for step in steps], warnings


async def trained_steps(
    recipe: Recipe, workers: WorkerGroup, *, traced: bool = False
) -> tuple[list[TrainedStep], list[str]]:
    warnings: list[str] = []
    algorithm = recipe.trainer.algorithm
    trained: list[int] = []
    trainer = StepTrainer(
        recipe, PolicyState.at(None, algorithm), workers, NoPublisher(), warnings.append, on_trained=trained.append
    )
    producer = Producer(
        Script(),
        TASKS,
        SimpleRows(),
        recipe.rollout,
        seed=0,
        total_steps=2,
        replacements=algorithm.dynamic_sampling,
        greedy_baseline=algorithm.needs.greedy_episode,
    )
    producer.admit(0)
    steps = [await trainer.run(step, producer, traced=traced) for step in (1, 2)]
    await producer.close()
    assert trained[-1] == recipe.rollout.batch_size and trained.count(trained[-1]) == len(steps)
    return steps, warnings


class SimpleRows:
    def __getitem__(self, index: int) -> int:
        return index % len(TASKS)


CHOICES: list[tuple[str, dict[str, Any], Callable[[dict[str, Any], dict[str, Any]], bool]]] = [
    (
        "gspo on whitened returns, a led KL penalty in the reward",
        {
            "advantage": "reinforce_pp", "gamma": 0.99, "loss": "gspo", "aggregation": "seq_mean_token_mean",
            "kl_coef": 0.1, "kl_in": "reward", "kl_estimator": "k1", "kl_target": 1e-3,
        },
        lambda one, two: one["train/kl_coef"] == 0.1 and two["train/kl_coef"] != 0.1 and one["train/kl_ref"] != 0.0,
    ),
    (
        "decoupled CISPO in two minibatches, sequence weights, KL in the loss",
        {
            "advantage": "reinforce_pp_baseline", "loss": "cispo", "aggregation": "constant",
            "aggregation_constant": LIMIT, "minibatches": 2, "kl_coef": 0.1, "kl_estimator": "low_var_kl",
            "correction": {"decoupled": True, "importance": "sequence"},
        },
        lambda one, two: two["train/kl_ref"] > 0.0 and one["mismatch/masked_frac"] == 0.0,
    ),
    (
        "remax with dynamic sampling, a token mask and a veto",
        {
            "advantage": "remax", "dynamic_sampling": 2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0,
            "correction": {"mask": "token", "mask_low": 0.6, "mask_high": 1.6, "veto": 0.1},
        },
        lambda one, two: (
            one["dynamic_sampling/replaced"] >= 1
            and 0.0 < one["mismatch/masked_frac"] < 1.0
            and one["remax/without_baseline"] == 0
        ),
    ),
    (
        "shaped rewards, geometric mask, plain policy gradient, entropy",
        {
            "advantage": "dr_grpo", "loss": "pg", "entropy_coef": 0.01,
            "shaping": {"wrong_reward": -1, "overlong_buffer": 20},
            "correction": {"mask": "geometric", "mask_low": 0.8, "mask_high": 1.25},
        },
        lambda one, two: one["reward/shaped_mean"] < one["reward/mean"],
    ),
    (
        "a critic that warms up for a step, two minibatches",
        {"advantage": "gae", "gamma": 0.99, "lam": 0.95, "minibatches": 2},
        lambda one, two: (
            one["critic/value_mean"] == 0.0
            and two["critic/value_mean"] != 0.0
            and one["train/loss"] is None
            and all(row["critic/loss"] > 0.0 and row["critic/grad_norm"] > 0.0 for row in (one, two))
        ),
    ),
]  # fmt: skip


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("algorithm", "shows"), [choice[1:] for choice in CHOICES], ids=[c[0] for c in CHOICES])
async def test_two_steps_train_what_the_recipe_says(
    workers: WorkerGroup, algorithm: dict[str, Any], shows: Callable[..., bool]
) -> None:
    rows, _ = await two_steps(recipe_of(algorithm), workers)
    for row in rows[1:] if algorithm["advantage"] == "gae" else rows:
        assert math.isfinite(row["train/loss"]) and row["train/grad_norm"] > 0.0
        assert 0.0 < row["mismatch/ess"] < 1.0 < row["mismatch/weight_max"]
        assert row["mismatch/logprob_abs_mean"] > 0.0 and row["mismatch/k3"] > 0.0
    assert shows(*rows)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_mismatch_is_warned_of_unless_a_correction_is_on(workers: WorkerGroup) -> None:
    _, warnings = await two_steps(recipe_of({}), workers)
    assert len(warnings) == 2 and all(text.startswith("engine and trainer disagree") for text in warnings)
    for key in ("trainer.mismatch_warn", "trainer.algorithm.correction", "decoupled", "importance", "mask", "veto"):
        assert key in warnings[0]
    _, warnings = await two_steps(recipe_of({"correction": {"decoupled": True}}), workers)
    assert warnings == []


@pytest.mark.asyncio(loop_scope="module")
async def test_the_records_of_a_step_hold_what_the_update_computed(workers: WorkerGroup) -> None:
    steps, _ = await trained_steps(recipe_of({"advantage": "grpo"}), workers, traced=True)
    for step in steps:
        records, numbers = step.records(SimpleRows()), step.metrics()
        assert len(records) == 16
        differences, spread = [], []
        for record in records:
            trajectory = record.trajectory
            mask = np.array(trajectory.loss_mask, dtype=bool)
            assert (record.step, record.split, record.version) == (step.step, "train", step.version - 1)
            assert (record.part, record.parts) == (0, 1)
            assert record.row == [group.index % len(TASKS) for group in step.groups][len(spread) // 4]
            assert record.trainer_logprobs is not None and record.advantages is not None
            assert np.isnan(record.trainer_logprobs[~mask]).all() and not record.advantages[~mask].any()
            engine = np.array(trajectory.logprobs, dtype=float)[mask]
            differences.append(np.abs(record.trainer_logprobs[mask] - engine))
            spread.append(float(record.advantages[mask][0]))
        # The mean that the ranks summed up is the mean of the numbers that they sent back.
        found = float(np.concatenate(differences).mean())
        assert found == pytest.approx(numbers["mismatch/logprob_abs_mean"], rel=1e-5)
        for group in range(4):
            assert sum(spread[4 * group : 4 * group + 4]) == pytest.approx(0.0, abs=1e-4)
    plain, _ = await trained_steps(recipe_of({"advantage": "grpo"}), workers)
    assert all(record.trainer_logprobs is None for record in plain[0].records(SimpleRows()))


@pytest.mark.asyncio(loop_scope="module")
async def test_logprobs_of_later_minibatches_are_those_before_the_update_or_unknown(workers: WorkerGroup) -> None:
    (first, _), _ = await trained_steps(recipe_of({"minibatches": 2}), workers, traced=True)
    known = [record.trainer_logprobs is not None for record in first.records(SimpleRows())]
    assert known == [True] * 8 + [False] * 8
    decoupled = recipe_of({"minibatches": 2, "correction": {"decoupled": True}})
    (first, _), _ = await trained_steps(decoupled, workers, traced=True)
    assert all(record.trainer_logprobs is not None for record in first.records(SimpleRows()))
