"""Rewards of tokens: where step and outcome rewards go, and the effect of shaping and KL penalties."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from agentloop.config import ESTIMATORS, AlgorithmConfig, ShapingConfig
from agentloop.types import EpisodeStatus, StepReward, StopReason, Task, Trajectory, Turn
from trainer.rollouts.producer import Group
from trainer.rollouts.samples import TrainGroup, collect, set_advantages

TASK = Task("0", "a", [])


def trajectory(reward: float | None, *steps: StepReward, orders: tuple[int, int] = (0, 1)) -> Trajectory:
    """Two prompt tokens, a turn of two tokens, two of tool output, a turn of three."""
    mask = [0, 0, 1, 1, 0, 0, 1, 1, 1]
    return Trajectory(
        token_ids=list(range(9)),
        loss_mask=mask,
        logprobs=[-0.5 * i if m else None for i, m in enumerate(mask)],
        versions=[1 if m else None for m in mask],
        prompt_length=2,
        turns=[Turn(2, 4, "", StopReason.STOP, order=orders[0]), Turn(6, 9, "", StopReason.STOP, order=orders[1])],
        reward=reward,
        outcome=reward,
        step_rewards=list(steps),
        agent_name="a",
    )


def done(*episodes: list[Trajectory], algorithm: dict[str, Any], **baseline: Any) -> TrainGroup:
    config = AlgorithmConfig.model_validate(algorithm)
    batch = collect(Group(0, TASK, list(episodes), **baseline), config.shaping, lambda _: 10)
    set_advantages(batch, config)
    return batch


def returns_by_hand(rewards: list[float], gamma: float) -> list[float]:
    return [math.fsum(gamma ** (k - t) * r for k, r in enumerate(rewards) if k >= t) for t in range(len(rewards))]


def test_returns_skip_tool_output_and_hold_the_step_rewards_at_the_ends_of_their_turns() -> None:
    batch = done(
        [trajectory(1.0, StepReward("search", 0.5, 2, 4))], algorithm={"advantage": "reinforce_pp", "gamma": 0.9}
    )
    g = returns_by_hand([0, 0.5, 0, 0, 1.0], 0.9)
    assert batch.samples[0].advantages.tolist() == pytest.approx([0, 0, g[0], g[1], 0, 0, g[2], g[3], g[4]], abs=1e-6)


def test_tool_output_of_any_length_leaves_the_returns_as_they_are() -> None:
    longer = trajectory(1.0)
    for name, filler in (("token_ids", 7), ("loss_mask", 0), ("logprobs", None), ("versions", None)):
        column = getattr(longer, name)
        setattr(longer, name, column[:5] + [filler] * 50 + column[5:])
    longer.turns[1].start, longer.turns[1].end = 56, 59
    algorithm = {"advantage": "reinforce_pp", "gamma": 0.5}
    plain, long = (done([t], algorithm=algorithm).samples[0] for t in (trajectory(1.0), longer))
    assert long.advantages[long.loss_mask].tolist() == plain.advantages[plain.loss_mask].tolist()


def test_a_forked_episode_is_one_sequence_of_decisions() -> None:
    """main: turns 0 and 3; its fork: turns 1 and 2. Main's last turn comes after the fork's step reward."""
    fork = trajectory(1.0, StepReward("search", 0.5, 6, 9), orders=(1, 2))
    main = trajectory(1.0, orders=(0, 3))
    batch = done([fork, main], algorithm={"advantage": "reinforce_pp", "gamma": 0.9})
    rewards = [0, 0, 0, 0, 0, 0, 0.5, 0, 0, 1.0]  # main 2, fork 2, fork 3, main 3
    g = returns_by_hand(rewards, 0.9)
    of_fork, of_main = batch.samples
    assert of_main.advantages[of_main.loss_mask].tolist() == pytest.approx(g[:2] + g[7:], abs=1e-6)
    assert of_fork.advantages[of_fork.loss_mask].tolist() == pytest.approx(g[2:7], abs=1e-6)


@pytest.mark.parametrize("advantage", ESTIMATORS)
def test_every_estimator_of_the_table_sets_advantages(advantage: str) -> None:
    batch = collect(Group(0, TASK, [[trajectory(1.0)], [trajectory(0.0)]], baseline=[trajectory(0.25)]))
    for episode in batch.episodes:
        episode.values = [np.full(9, 0.5, dtype=np.float32)]
    set_advantages(batch, AlgorithmConfig(advantage=advantage))
    right, wrong = batch.samples
    assert right.advantages[right.loss_mask].max() > wrong.advantages[wrong.loss_mask].max()
    assert not right.advantages[~right.loss_mask].any()


def test_gae_reads_values_of_sampled_tokens_and_gives_the_critic_its_targets() -> None:
    batch = collect(Group(0, TASK, [[trajectory(1.0)]]))
    episode = batch.episodes[0]
    episode.values = [np.array([9, 9, 0.1, 0.2, 9, 9, 0.3, 0.4, 0.5], dtype=np.float32)]
    set_advantages(batch, AlgorithmConfig(advantage="gae", gamma=0.9, lam=0.8))
    values, rewards = [0.1, 0.2, 0.3, 0.4, 0.5, 0.0], [0, 0, 0, 0, 1.0]
    deltas = [rewards[t] + 0.9 * values[t + 1] - values[t] for t in range(5)]
    expected = [math.fsum(0.72 ** (k - t) * deltas[k] for k in range(t, 5)) for t in range(5)]
    sample = episode.samples[0]
    assert sample.advantages[sample.loss_mask].tolist() == pytest.approx(expected, abs=1e-6)
    assert episode.returns is not None
    targets = [a + v for a, v in zip(expected, values[:5], strict=True)]
    assert episode.returns[0][sample.loss_mask].tolist() == pytest.approx(targets, abs=1e-6)


def test_a_penalty_is_taken_token_by_token_or_from_the_whole_reward() -> None:
    penalty = np.array([0, 0, 0.1, 0.2, 0, 0, 0.3, 0.4, 0.5], dtype=np.float32)

    def with_penalty(advantage: str) -> np.ndarray:
        batch = collect(Group(0, TASK, [[trajectory(1.0)], [trajectory(0.0)]]))
        batch.episodes[0].penalties = [penalty]
        set_advantages(batch, AlgorithmConfig.model_validate({"advantage": advantage}))
        return batch.samples[0].advantages[batch.samples[0].loss_mask]

    assert with_penalty("reinforce_pp").tolist() == pytest.approx([-0.5, -0.4, -0.2, 0.1, 0.5], abs=1e-6)
    # (1 - 1.5) and 0: their mean is -0.25
    assert with_penalty("dr_grpo").tolist() == pytest.approx([-0.25] * 5, abs=1e-6)


def test_remax_uses_the_greedy_episode_and_does_not_train_it() -> None:
    batch = done([trajectory(1.0)], [trajectory(0.0)], algorithm={"advantage": "remax"}, baseline=[trajectory(0.25)])
    first, second = batch.samples
    assert set(first.advantages[first.loss_mask]) == {0.75} and set(second.advantages[second.loss_mask]) == {-0.25}


def test_without_a_greedy_reward_a_remax_group_is_left_out() -> None:
    failed = trajectory(None)
    failed.status = EpisodeStatus.FAILED
    assert done([trajectory(1.0)], algorithm={"advantage": "remax"}, baseline=[failed]).samples == []


def test_shaping_changes_what_advantages_see_and_not_the_reward_of_the_trajectory() -> None:
    shaping = {"wrong_reward": -1.0, "turn_bonus": 0.1, "turn_bonus_cap": -0.6, "overlong_buffer": 6}
    right, wrong = trajectory(1.0), trajectory(0.0)
    batch = done([right], [wrong], algorithm={"advantage": "dr_grpo", "shaping": shaping})
    # 7 tokens after the prompt of 10 allowed, 6 of them the buffer: -(7 - 4) / 6
    assert [episode.reward for episode in batch.episodes] == pytest.approx([1.0 - 0.5, -0.9 - 0.5])
    assert batch.samples[0].advantages[2] == pytest.approx(0.95)
    assert (right.reward, wrong.reward) == (1.0, 0.0)


@pytest.mark.parametrize("advantage", ["reinforce_pp", "grpo_process"])
def test_shaping_stands_at_the_end_of_an_episode_with_step_rewards(advantage: str) -> None:
    steps = [StepReward("search", 0.5, 2, 4)]
    plain = trajectory(0.5, *steps)
    plain.outcome = None
    other = trajectory(1.0, *steps)
    batch = collect(
        Group(0, TASK, [[plain], [other]]), ShapingConfig(overlong_buffer=6, overlong_penalty=0.5), lambda _: 10
    )
    set_advantages(batch, AlgorithmConfig.model_validate({"advantage": advantage}))
    sample = batch.samples[0]
    if advantage == "reinforce_pp":
        assert sample.advantages[sample.loss_mask].tolist() == pytest.approx([0.25, 0.25, -0.25, -0.25, -0.25])
    else:  # R = {0.5 - 0.25 | 0.5, 1 - 0.25}
        assert batch.samples[0].advantages[2] == pytest.approx((0.25 - 0.5) / (0.25 + 1e-6), abs=1e-5)
