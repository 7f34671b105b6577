"""From groups to samples: which episodes are trained, with which advantage and weight."""

from __future__ import annotations

import numpy as np
import pytest

from agentloop.types import EpisodeStatus, StepReward
from tests.trainer.conftest import samples_of
from tests.trainer.episodes import TASK, group, trajectory
from trainer.algorithms.aggregation import normalizer
from trainer.packing.layout import pack
from trainer.packing.units import plan_units
from trainer.rollouts.producer import Group
from trainer.types import Aggregation, TrainSample


def test_advantages_are_on_sampled_tokens_only() -> None:
    samples = samples_of(group([trajectory(1.0)], [trajectory(0.0)]), "grpo")
    for sample, sign in zip(samples, (1, -1), strict=True):
        assert (np.sign(sample.advantages) == [0, 0, sign, 0, sign]).all()
        assert sample.loss_mask.tolist() == [False, False, True, False, True]
        assert sample.old_logprobs.tolist() == [0.0, 0.0, -0.5, 0.0, -0.25]
        assert (sample.group_key, sample.prompt_length, sample.weight) == (3, 2, 1.0)


def test_a_sample_takes_13_bytes_a_token_and_is_packed_for_indexing() -> None:
    samples = samples_of(group([trajectory(1.0)], [trajectory(0.0)]), "grpo")
    columns = [samples[0].token_ids, samples[0].loss_mask, samples[0].old_logprobs, samples[0].advantages]
    assert sum(column.nbytes for column in columns) == 13 * len(samples[0])
    batch = pack(samples, plan_units(samples, 10_000), "token_mean")
    assert batch.tokens.dtype == batch.targets.dtype == np.int64


@pytest.mark.parametrize("status", [EpisodeStatus.FAILED, EpisodeStatus.REJECTED])
def test_failures_are_masked_and_do_not_move_the_baseline(status: EpisodeStatus) -> None:
    plain = samples_of(group([trajectory(1.0)], [trajectory(0.0)]), "grpo")
    with_failure = samples_of(group([trajectory(1.0)], [trajectory(None, status)], [trajectory(0.0)]), "grpo")
    assert len(with_failure) == 2
    for a, b in zip(plain, with_failure, strict=True):
        assert (a.advantages == b.advantages).all()


def test_a_forked_episode_weighs_as_one() -> None:
    samples = samples_of(group([trajectory(1.0), trajectory(1.0)], [trajectory(0.0)]), "grpo")
    assert [sample.weight for sample in samples] == [0.5, 0.5, 1.0]
    assert samples[0].advantages[2] == -samples[2].advantages[2] > 0


def weight_of(samples: list[TrainSample], chosen: range, aggregation: Aggregation) -> float:
    """Return the share of the loss that belongs to the tokens of the chosen samples."""
    batch = pack(samples, plan_units(samples, 10_000), aggregation)
    return float(batch.loss_weights[np.isin(batch.sample_index, chosen)].sum()) / normalizer(samples, aggregation)


@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_sum", "seq_mean_token_mean"])
@pytest.mark.parametrize("forks", [1, 2, 5])
def test_an_episode_counts_once_in_the_loss_whatever_the_number_of_its_trajectories(
    aggregation: Aggregation, forks: int
) -> None:
    plain = samples_of(group([trajectory(1.0)], [trajectory(0.0)]), "grpo")
    forked = samples_of(group([trajectory(1.0)] * forks, [trajectory(0.0)]), "grpo")
    assert len(forked) == forks + 1
    assert weight_of(forked, range(forks), aggregation) == pytest.approx(weight_of(plain, range(1), aggregation))
    assert weight_of(forked, range(forks, forks + 1), aggregation) == pytest.approx(
        weight_of(plain, range(1, 2), aggregation)
    )


@pytest.mark.parametrize(("aggregation", "share"), [("seq_mean_token_mean", 0.5), ("token_mean", (1.5 / 3.5))])
def test_trajectories_of_a_forked_episode_share_its_weight(aggregation: Aggregation, share: float) -> None:
    short = trajectory(1.0)
    short.loss_mask, short.turns = [0, 0, 1, 0, 0], short.turns[:1]
    samples = samples_of(group([short, trajectory(1.0)], [trajectory(0.0)]), "grpo")
    assert weight_of(samples, range(2), aggregation) == pytest.approx(share)


def test_samples_share_a_prompt_only_where_it_is_the_same() -> None:
    fork = trajectory(1.0)
    fork.prompt_length, fork.loss_mask, fork.turns = 3, [0, 0, 0, 0, 1], fork.turns[1:]
    other = trajectory(0.0)
    other.token_ids = [9, *other.token_ids[1:]]
    samples = samples_of(group([fork, trajectory(1.0)], [trajectory(0.0)], [other]), "grpo")
    keys = [sample.group_key for sample in samples]
    assert keys[1] == keys[2] and len({*keys}) == 3
    next_group = samples_of(Group(4, TASK, [[fork, trajectory(1.0)]]), "grpo")
    assert not {*keys} & {sample.group_key for sample in next_group}
    batch = pack(samples, plan_units(samples, 10_000), "token_mean")
    for index, position, target in zip(batch.sample_index, batch.token_index, batch.targets, strict=True):
        assert samples[index].token_ids[position] == target
    packed = [batch.tokens.tolist().count(token) for token in (9, 1)]
    assert packed == [1, 2], "the prompt of the group once, those of the fork and of the other episode on their own"


def test_process_supervision_gives_each_turn_what_is_ahead_of_it() -> None:
    a, b = trajectory(1.0), trajectory(0.0)
    a.outcome, b.outcome = 1.0, 0.0
    a.step_rewards = [StepReward("calculator", 1.0, 2, 3)]
    b.step_rewards = [StepReward("calculator", 0.0, 2, 3), StepReward("user", 1.0, 4, 5)]
    # R = {1, 1 | 0, 1, 0}: mean 0.6, std sqrt(0.3)
    high, low = 0.4 / (np.sqrt(0.3) + 1e-6), -0.6 / (np.sqrt(0.3) + 1e-6)
    first, second = samples_of(group([a], [b]), "grpo_process")
    assert first.advantages.tolist() == pytest.approx([0, 0, 2 * high, 0, high], abs=1e-6)
    assert second.advantages.tolist() == pytest.approx([0, 0, 2 * low + high, 0, high + low], abs=1e-6)


def test_process_supervision_without_step_rewards_is_grpo() -> None:
    episodes = [[trajectory(1.0)], [trajectory(0.0)], [trajectory(0.25), trajectory(0.25)]]
    for a, b in zip(samples_of(group(*episodes), "grpo_process"), samples_of(group(*episodes), "grpo"), strict=True):
        assert a.advantages.tolist() == b.advantages.tolist() and a.weight == b.weight


def test_process_supervision_without_a_reward_function_counts_no_step_twice() -> None:
    a, b = trajectory(1.0), trajectory(0.0)  # rewards that are the sums of the steps
    a.step_rewards = [StepReward("calculator", 1.0, 2, 3)]
    first, second = samples_of(group([a], [b]), "grpo_process")
    one = 0.5 / (np.sqrt(0.5) + 1e-6)
    assert first.advantages.tolist() == pytest.approx([0, 0, one, 0, 0], abs=1e-6), "nothing came after the second turn"
    assert second.advantages.tolist() == pytest.approx([0, 0, -one, 0, -one], abs=1e-6)


def test_process_supervision_orders_the_turns_of_all_trajectories() -> None:
    """main: turns 0 and 3; its fork: turns 1 and 2. The fork's step reward counts for turns 0 and 1."""
    fork, main, other = trajectory(0.0), trajectory(0.0), trajectory(0.0)
    for turn, order in zip([*main.turns, *fork.turns], [0, 3, 1, 2], strict=True):
        turn.order = order
    fork.step_rewards = [StepReward("search", 1.0, 2, 3)]
    for t in (fork, main, other):
        t.outcome = 0.0
    # R = {1, 0 | 0}: mean 1/3, std sqrt(1/3)
    step, end = (2 / 3) / (np.sqrt(1 / 3) + 1e-6), (-1 / 3) / (np.sqrt(1 / 3) + 1e-6)
    of_fork, of_main, of_other = samples_of(group([fork, main], [other]), "grpo_process")
    assert of_fork.advantages.tolist() == pytest.approx([0, 0, step + end, 0, end], abs=1e-6)
    assert of_main.advantages.tolist() == pytest.approx([0, 0, step + end, 0, end], abs=1e-6)
    assert of_other.advantages.tolist() == pytest.approx([0, 0, end, 0, end], abs=1e-6)


def test_a_group_in_which_everything_failed_gives_no_samples() -> None:
    assert samples_of(group([trajectory(None, EpisodeStatus.FAILED)]), "grpo") == []
