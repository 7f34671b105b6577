"""The critic of one rank: its values, its gradient, its steps, its place in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from agentloop.config import TrainerConfig
from agentloop.errors import RunDirError, WorkerError
from tests.trainer.conftest import make_samples
from trainer.learner.learner import Learner
from trainer.types import LearnerSettings, TrainSample, ValueSample

pytestmark = pytest.mark.usefixtures("process_group")


def learner(model: Path, *, critic: bool = True, **config: Any) -> Learner:
    settings: dict[str, Any] = {"logprob_chunk": 16} | config
    if critic:
        settings |= {
            "algorithm": {"advantage": "gae"},
            "critic": {"optim": {"lr": 1e-2, "grad_clip": 1e9}, "cliprange_value": None},
        }
    trainer = TrainerConfig.model_validate(settings)
    return Learner(LearnerSettings(str(model), trainer, "float32", 10, 0))


def with_targets(samples: list[TrainSample]) -> list[ValueSample]:
    rng = np.random.default_rng(7)
    return [
        ValueSample.of(
            sample,
            values=np.zeros(len(sample), dtype=np.float32),
            returns=np.where(sample.loss_mask, rng.normal(size=len(sample)), 0.0).astype(np.float32),
        )
        for sample in samples
    ]


def gradients(of: Learner) -> torch.Tensor:
    return torch.cat([p.grad.to_local().flatten().double() for p in of.critic.model.parameters() if p.grad is not None])


def test_a_fresh_critic_values_everything_at_zero_and_learns_its_targets(tiny_model: Path) -> None:
    of = learner(tiny_model)
    samples = with_targets(make_samples(groups=2))
    _, _, before = of.values(samples)
    assert not before.any()
    losses = []
    for _ in range(8):
        sums = of.accumulate_values(samples)
        losses.append(sums["value_loss_sum"])
        metrics = of.critic.step(float(sum(s.trained_tokens for s in samples)))
        assert metrics["grad_norm"] > 0.0
    assert losses[-1] < 0.9 * losses[0]
    assert of.steps == 0 and of.critic.steps == 8


def test_values_are_of_the_state_before_the_token_and_the_gradient_is_that_of_plain_transformers(
    tiny_model: Path,
) -> None:
    of = learner(tiny_model)
    samples = with_targets(make_samples(groups=2, size=3))
    of.accumulate_values(samples)
    of.critic.step(10.0)  # now the head is no longer zero, and the backbone has a gradient
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager")
    ours = {name.removeprefix("lm."): p.to_local() for name, p in of.critic.model.named_parameters()}
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(ours[name])
    head = ours["value_head.weight"].detach().clone().requires_grad_()
    index, token, values = of.values(samples)
    total = torch.zeros(())
    for i, sample in enumerate(samples):
        hidden = plain.model(input_ids=torch.from_numpy(sample.token_ids)[None]).last_hidden_state[0]
        theirs = (hidden @ head.T).squeeze(-1)[:-1]
        assert values[index == i] == pytest.approx(theirs.detach().numpy()[token[index == i] - 1], abs=1e-5)
        error = (theirs - torch.from_numpy(sample.returns[1:]))[torch.from_numpy(sample.loss_mask[1:])]
        total = total + 0.5 * (error**2).sum()
    total.backward()
    sums = of.accumulate_values(samples)
    assert sums["value_loss_sum"] == pytest.approx(total.item(), rel=1e-5)
    by_name = {"value_head.weight": head.grad} | {name: p.grad for name, p in plain.named_parameters()}
    expected = torch.cat([by_name[name].flatten().double() for name in ours])
    assert ((gradients(of) - expected).norm() / expected.norm()).item() < 1e-5


def test_the_critics_gradient_does_not_depend_on_micro_batches(tiny_model: Path) -> None:
    samples = with_targets(make_samples(groups=4, size=6))
    found = []
    for budget in (8192, 100):
        of = learner(tiny_model, tokens_per_micro_batch=budget)
        of.accumulate_values(samples)
        found.append(gradients(of))
    assert ((found[0] - found[1]).norm() / found[0].norm()).item() < 1e-6


def test_a_checkpoint_brings_the_critic_back_to_the_bit(tiny_model: Path, tmp_path: Path) -> None:
    samples = with_targets(make_samples(groups=2))

    def train(of: Learner, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            losses.append(of.accumulate_values(samples)["value_loss_sum"])
            losses.append(of.critic.step(50.0)["grad_norm"])
        return losses

    straight = learner(tiny_model)
    train(straight, 2)
    straight.save(tmp_path / "step_2", {})
    expected = train(straight, 2)
    resumed = learner(tiny_model)
    resumed.load(tmp_path / "step_2" / "trainer", optimizer=True)
    assert resumed.critic.steps == 2
    assert train(resumed, 2) == expected


def test_with_adapters_a_critic_trains_its_own_and_its_head(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    samples = with_targets(make_samples(groups=2))
    of = learner(tiny_model, lora={"rank": 2})
    trained = {name for name, p in of.critic.model.named_parameters() if p.requires_grad}
    assert "value_head.weight" in trained and all("lora_" in name for name in trained - {"value_head.weight"})
    before = of.logprobs(samples, 1.0)[2]
    for _ in range(3):
        loss = of.accumulate_values(samples)["value_loss_sum"]
        of.critic.step(50.0)
    assert np.array_equal(of.logprobs(samples, 1.0)[2], before), "the policy's adapters are others"
    of.save(tmp_path / "step_1", {})
    again = learner(tiny_model, lora={"rank": 2})
    again.load(tmp_path / "step_1" / "trainer", optimizer=True)
    assert again.accumulate_values(samples) | {"time_s": 0} == of.accumulate_values(samples) | {"time_s": 0}
    assert again.accumulate_values(samples)["value_loss_sum"] < loss


def test_a_run_without_a_critic_says_so(tiny_model: Path, tmp_path: Path) -> None:
    of = learner(tiny_model, critic=False)
    with pytest.raises(WorkerError, match="no critic"):
        of.values(make_samples())
    of.save(tmp_path / "step_1", {})
    with pytest.raises(RunDirError, match="has no critic"):
        learner(tiny_model).load(tmp_path / "step_1" / "trainer", optimizer=True)
