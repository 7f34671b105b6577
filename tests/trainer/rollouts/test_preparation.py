"""Quantities computed for samples before the update, by ranks that return known numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from agentloop.config import Recipe
from agentloop.types import StopReason, Task, Trajectory, Turn
from trainer.algorithms.kl import KlCoefficient
from trainer.rollouts.preparation import BatchPreparation
from trainer.rollouts.producer import Group
from trainer.rollouts.samples import TrainGroup
from trainer.types import TrainSample


class KnownRanks:
    """Ranks that give each trained token logprob -2 (reference) or -3 (policy) and value 0.5."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def logprobs(
        self, samples: Sequence[TrainSample], *, temperature: float, of: str = "policy"
    ) -> list[np.ndarray]:
        self.asked.append(of)
        return [np.where(s.loss_mask, -2.0 if of == "reference" else -3.0, 0.0).astype(np.float32) for s in samples]

    async def values(self, samples: Sequence[TrainSample]) -> list[np.ndarray]:
        self.asked.append("values")
        return [np.where(s.loss_mask, 0.5, 0.0).astype(np.float32) for s in samples]


def episode(reward: float, tokens: int) -> list[Trajectory]:
    """A prompt of two tokens, then `tokens` sampled ones of logprob -1."""
    return [
        Trajectory(
            token_ids=[1] * (2 + tokens),
            loss_mask=[0, 0] + [1] * tokens,
            logprobs=[None, None] + [-1.0] * tokens,
            versions=[None, None] + [0] * tokens,
            prompt_length=2,
            turns=[Turn(2, 2 + tokens, "", StopReason.STOP)],
            reward=reward,
            outcome=reward,
            agent_name="a",
        )
    ]


async def prepared(algorithm: dict[str, Any], kl: float = 0.0) -> tuple[list[TrainGroup], BatchPreparation, KnownRanks]:
    trainer: dict[str, Any] = {"algorithm": algorithm}
    if algorithm.get("advantage") == "gae":
        trainer["critic"] = {}
    recipe = Recipe.model_validate(
        {
            "run": {"steps": 1},
            "model": {"path": "m"},
            "data": {"train": "d"},
            "rollout": {"batch_size": 2},
            "trainer": trainer,
        }
    )
    ranks = KnownRanks()
    # KnownRanks has the two commands that preparation uses.
    preparation = BatchPreparation(recipe, ranks, KlCoefficient(kl))  # type: ignore[arg-type]
    groups = [
        Group(0, Task("0", "a", []), [episode(1.0, 3), episode(0.0, 1)]),
        Group(1, Task("1", "a", []), [episode(1.0, 2), episode(0.5, 2)]),
    ]
    batch = [preparation.collect(group) for group in groups]
    await preparation.prepare(batch)
    preparation.finish(batch)
    return batch, preparation, ranks


def advantages_of(batch: list[TrainGroup]) -> list[list[float]]:
    return [s.advantages[s.loss_mask].tolist() for group in batch for s in group.samples]


async def test_an_estimator_of_the_group_asks_the_ranks_for_nothing() -> None:
    batch, preparation, ranks = await prepared({"advantage": "dr_grpo"})
    assert ranks.asked == []
    assert advantages_of(batch) == [[0.5] * 3, [-0.5], [0.25] * 2, [-0.25] * 2]
    assert preparation.metrics == {}


async def test_whitening_is_over_the_tokens_of_all_groups() -> None:
    plain = [0.5] * 3 + [-0.5] + [0.25] * 2 + [-0.25] * 2
    mean = math.fsum(plain) / 8
    std = math.sqrt(math.fsum((a - mean) ** 2 for a in plain) / 8)
    batch, _, _ = await prepared({"advantage": "reinforce_pp_baseline"})
    found = [a for column in advantages_of(batch) for a in column]
    assert found == pytest.approx([(a - mean) / (std + 1e-6) for a in plain], abs=1e-5)
    unwhitened, _, _ = await prepared({"advantage": "reinforce_pp_baseline", "whiten": False})
    assert [a for column in advantages_of(unwhitened) for a in column] == plain


async def test_a_penalty_in_the_reward_is_the_coefficient_times_the_estimate_against_the_reference() -> None:
    batch, preparation, ranks = await prepared(
        {"advantage": "reinforce_pp", "whiten": False, "kl_coef": 0.1, "kl_in": "reward", "kl_estimator": "k1"}, kl=0.25
    )
    # k1 is -1 - -2 = 1 at each of the 8 tokens; the coefficient is the led one, 0.25.
    assert ranks.asked == ["reference"]
    assert advantages_of(batch)[0] == pytest.approx([0.25, 0.5, 0.75])
    assert preparation.sums == {"kl_ref_sum": 8.0}
    assert preparation.metrics == {"train/kl_coef": 0.25}
    assert preparation.loss.kl_coef == 0.0


async def test_a_led_coefficient_is_that_of_the_loss() -> None:
    _, preparation, ranks = await prepared({"kl_coef": 0.1, "kl_target": 0.05}, kl=0.25)
    assert preparation.loss.kl_coef == 0.25 and ranks.asked == []


@pytest.mark.parametrize("correction", [{"decoupled": True}, {"mask": "token"}, {"veto": 0.1}])
async def test_the_proximal_policy_is_recomputed_where_a_step_has_several_minibatches(correction: Any) -> None:
    batch, _, ranks = await prepared({"minibatches": 2, "correction": correction})
    assert ranks.asked == ["policy"]
    for sample in batch[0].samples:
        assert sample.proximal_logprobs is not None
        assert set(sample.proximal_logprobs[sample.loss_mask]) == {-3.0}
    once, _, ranks = await prepared({"correction": correction})
    assert ranks.asked == [] and once[0].samples[0].proximal_logprobs is None


async def test_the_critic_learns_returns_and_its_metrics_know_them() -> None:
    batch, preparation, ranks = await prepared({"advantage": "gae", "lam": 1.0})
    assert ranks.asked == ["values"]
    samples = preparation.value_samples(batch)
    assert [s.values[s.loss_mask].tolist() for s in samples] == [[0.5] * 3, [0.5], [0.5] * 2, [0.5] * 2]
    returns = [1.0] * 3 + [0.0] + [1.0] * 2 + [0.5] * 2
    assert [r for s in samples for r in s.returns[s.loss_mask].tolist()] == returns
    assert preparation.metrics["critic/value_mean"] == 0.5
    assert preparation.metrics["critic/return_mean"] == pytest.approx(math.fsum(returns) / 8)
    assert preparation.metrics["critic/explained_variance"] == pytest.approx(0.0)
