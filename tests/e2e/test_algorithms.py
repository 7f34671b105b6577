"""A whole command with the parts of an algorithm that have a state of their own: critic, led KL coefficient."""

from __future__ import annotations

import json
from typing import Any

import pytest


def test_critic_and_led_coefficient_go_on_after_a_resume(quickstart: Any) -> None:
    keys = [
        "eval.before_train=false", "eval.every=null", "trainer.algorithm.advantage=gae", "trainer.critic.optim.lr=1e-3",
        "trainer.algorithm.kl_coef=0.05", "trainer.algorithm.kl_in=reward", "trainer.algorithm.kl_target=0.5",
        "trainer.algorithm.dynamic_sampling=1",
    ]  # fmt: skip
    first = quickstart("run.steps=1", *keys)
    assert first.code == 0, first.err
    assert "training waits for the last group of a step" in first.out
    rest = quickstart("--resume", "run.steps=2", *keys)
    assert rest.code == 0, rest.err
    one, two = rest.train_metrics
    assert one["train/kl_coef"] == 0.05
    assert two["train/kl_coef"] == pytest.approx(0.05 * (1 + 0.1 * -0.2)), "a KL of about 0 is far below its target"
    state = json.loads((rest.dir / "checkpoints" / "step_2" / "state.json").read_text())
    assert state["kl_coef"] < two["train/kl_coef"]
    assert one["critic/value_mean"] == 0.0 and two["critic/value_mean"] != 0.0, "the critic was not begun anew"
    assert all("dynamic_sampling/replaced" in row for row in (one, two))
