"""How the parts of a loss are put together, and the schedule, against computations written out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from agentloop.config import AlgorithmConfig, OptimConfig
from trainer.learner.loss import token_losses
from trainer.learner.losses.ratios import Segments
from trainer.learner.optim import learning_rate
from trainer.types import LossSpec

ALONE = Segments.of(np.arange(50))


def test_terms_of_the_loss_add_up() -> None:
    rng = np.random.default_rng(1)
    lp, old, adv, ref, ent = (torch.tensor(rng.normal(-2, 0.3, 50)) for _ in range(5))
    base, _ = token_losses(LossSpec(), lp, ent, old, adv, None, ALONE)
    full, detail = token_losses(LossSpec(kl_coef=0.1, entropy_coef=0.01), lp, ent, old, adv, ref, ALONE)
    d = ref.numpy() - lp.numpy()
    expected = base.numpy() + 0.1 * (np.exp(d) - d - 1) - 0.01 * ent.numpy()
    assert full.numpy() == pytest.approx(expected, rel=1e-12)
    assert detail["kl_ref"].numpy() == pytest.approx(np.exp(d) - d - 1, rel=1e-12)
    sft, _ = token_losses(LossSpec(kind="sft"), lp, ent, old, adv, None, ALONE)
    assert torch.equal(sft, -lp)


def test_decoupled_losses_take_the_ratio_against_the_proximal_policy_and_weigh_what_the_engine_did() -> None:
    rng = np.random.default_rng(2)
    lp, engine, proximal, adv = (rng.normal(-2, 0.4, 50) for _ in range(4))
    spec = LossSpec(decoupled=True, importance="token", importance_cap=1.5, mask="token", mask_low=0.5, mask_high=3.0)
    columns = [torch.tensor(column) for column in (lp, engine, adv, proximal)]
    loss, detail = token_losses(spec, columns[0], columns[0], columns[1], columns[2], None, ALONE, columns[3])
    kept = 0
    for n in range(50):
        weight = math.exp(proximal[n] - engine[n])
        ratio = math.exp(lp[n] - proximal[n])
        keep = 0.5 <= weight <= 3.0
        expected = -min(weight, 1.5) * min(ratio * adv[n], min(max(ratio, 0.8), 1.2) * adv[n]) if keep else 0.0
        assert loss[n].item() == pytest.approx(expected, rel=1e-9)
        assert detail["masked"][n].item() is not keep
        assert detail["weight"][n].item() == pytest.approx(weight, rel=1e-9)
        kept += keep
    assert 0 < kept < 50


def test_without_recomputed_logprobs_the_present_policy_is_the_proximal_one() -> None:
    rng = np.random.default_rng(3)
    lp, engine, adv = (torch.tensor(rng.normal(-2, 0.4, 50), requires_grad=not i) for i in range(3))
    spec = LossSpec(decoupled=True, importance="token", importance_cap=1.1)
    token_losses(spec, lp, lp, engine, adv, None, ALONE)[0].sum().backward()
    weights = (lp.detach() - engine).exp().clamp(max=1.1)
    assert (weights == 1.1).any(), "a truncated weight has no gradient, its token has"
    assert torch.allclose(lp.grad, -weights * adv)


def test_the_loss_is_what_the_config_says() -> None:
    config = AlgorithmConfig.model_validate(
        {
            "loss": "cispo", "clip_ratio_low": 1.0, "clip_ratio_high": 0.28, "kl_coef": 0.1, "kl_estimator": "k2",
            "entropy_coef": 0.2, "aggregation": "constant", "aggregation_constant": 512,
            "correction": {"decoupled": True, "mask": "geometric", "veto": 1e-4},
        }
    )  # fmt: skip
    assert LossSpec.from_config(config) == LossSpec(
        kind="cispo", clip_ratio_low=1.0, clip_ratio_high=0.28, kl_coef=0.1, kl_estimator="k2", entropy_coef=0.2,
        aggregation="constant", aggregation_constant=512.0, decoupled=True, importance="token", importance_cap=2.0,
        mask="geometric", mask_low=0.99, mask_high=1.01, veto=1e-4,
    )  # fmt: skip
    assert LossSpec(**json.loads(json.dumps(asdict(LossSpec.from_config(config))))) == LossSpec.from_config(config)
    in_reward = AlgorithmConfig(kl_coef=0.1, kl_in="reward")
    assert LossSpec.from_config(in_reward).kl_coef == 0.0


def test_learning_rate_warms_up_and_ends_where_it_should() -> None:
    constant = OptimConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(constant, step, 100) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    linear = OptimConfig(lr=1.0, lr_end=0.0, schedule="linear")
    assert [learning_rate(linear, step, 5) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    cosine = OptimConfig(lr=1.0, lr_end=0.2, schedule="cosine", warmup_steps=1)
    values = [learning_rate(cosine, step, 6) for step in range(6)]
    assert values[1] == pytest.approx(1.0)
    assert values[3] == pytest.approx(0.6)
    assert values[5] == pytest.approx(0.2)
    assert learning_rate(cosine, 50, 6) == pytest.approx(0.2)
