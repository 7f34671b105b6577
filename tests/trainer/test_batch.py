"""From groups to samples: who is trained, with what advantage, and what a step reports."""

from __future__ import annotations

import numpy as np
import pytest

from agentloop.types import EpisodeStatus, StopReason, Task, Trajectory, Turn
from trainer.batch import episode_metrics, eval_metrics, failure_causes, train_samples
from trainer.producer import Group

TASK = Task("0", "a", [])


def trajectory(reward: float | None, status: EpisodeStatus = EpisodeStatus.OK, version: int = 2) -> Trajectory:
    return Trajectory(
        token_ids=[1, 2, 3, 4, 5],
        loss_mask=[0, 0, 1, 0, 1],
        logprobs=[None, None, -0.5, None, -0.25],
        versions=[None, None, version, None, version],
        prompt_length=2,
        turns=[Turn(2, 3, "", StopReason.STOP), Turn(4, 5, "", StopReason.STOP)],
        reward=reward,
        status=status,
        error=None if status is EpisodeStatus.OK else f"{status.value} on purpose",
        metrics={"tool_calls": 1.0},
        task_id="7",
    )


def group(*episodes: list[Trajectory]) -> Group:
    return Group(3, TASK, list(episodes))


def test_advantages_are_on_sampled_tokens_only() -> None:
    samples = train_samples(group([trajectory(1.0)], [trajectory(0.0)]), "grpo")
    for sample, sign in zip(samples, (1, -1), strict=True):
        assert (np.sign(sample.advantages) == [0, 0, sign, 0, sign]).all()
        assert sample.loss_mask.tolist() == [False, False, True, False, True]
        assert sample.old_logprobs.tolist() == [0.0, 0.0, -0.5, 0.0, -0.25]
        assert (sample.group_key, sample.prompt_length, sample.weight) == (3, 2, 1.0)


@pytest.mark.parametrize("status", [EpisodeStatus.FAILED, EpisodeStatus.REJECTED])
def test_failures_are_masked_and_do_not_move_the_baseline(status: EpisodeStatus) -> None:
    plain = train_samples(group([trajectory(1.0)], [trajectory(0.0)]), "grpo")
    with_failure = train_samples(group([trajectory(1.0)], [trajectory(None, status)], [trajectory(0.0)]), "grpo")
    assert len(with_failure) == 2
    for a, b in zip(plain, with_failure, strict=True):
        assert (a.advantages == b.advantages).all()


def test_a_forked_episode_weighs_as_one() -> None:
    samples = train_samples(group([trajectory(1.0), trajectory(1.0)], [trajectory(0.0)]), "grpo")
    assert [sample.weight for sample in samples] == [0.5, 0.5, 1.0]
    assert samples[0].advantages[2] == -samples[2].advantages[2] > 0


def test_a_group_in_which_everything_failed_gives_no_samples() -> None:
    assert train_samples(group([trajectory(None, EpisodeStatus.FAILED)]), "grpo") == []


def test_the_numbers_of_a_step() -> None:
    groups = [
        group([trajectory(1.0)], [trajectory(0.0, version=1)], [trajectory(None, EpisodeStatus.FAILED, version=0)]),
        group([trajectory(0.5), trajectory(0.5)]),
    ]
    metrics = episode_metrics(groups, version=2)
    assert metrics["reward/mean"] == pytest.approx(0.5)
    assert metrics["episode/count"] == 4 and metrics["episode/forks"] == 1
    assert metrics["episode/failed"] == 1 and metrics["episode/rejected"] == 0
    assert metrics["rollout/tokens"] == 10
    assert metrics["staleness/max"] == 1, "a failed episode is not trained, so it cannot be stale"
    assert metrics["stop/stop"] == 4 and metrics["episode/tool_calls_mean"] == 1.0


def test_an_empty_step_has_no_mean() -> None:
    metrics = episode_metrics([group([trajectory(None, EpisodeStatus.FAILED)])], version=0)
    assert metrics["reward/mean"] is None


def test_evaluation_leaves_failures_out_of_the_mean_and_counts_them() -> None:
    metrics = eval_metrics([[trajectory(1.0)], [trajectory(None, EpisodeStatus.FAILED)]])
    assert (metrics["eval/reward_mean"], metrics["eval/failed"], metrics["eval/episodes"]) == (1.0, 1, 2)


def test_causes_are_listed_once_each() -> None:
    failed = trajectory(None, EpisodeStatus.FAILED)
    rejected = trajectory(None, EpisodeStatus.REJECTED)
    assert failure_causes([failed, failed, trajectory(1.0), rejected]) == [
        "failed (row 7): failed on purpose",
        "rejected (row 7): rejected on purpose",
    ]
