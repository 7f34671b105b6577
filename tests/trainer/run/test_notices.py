"""Notices and warnings about a run's settings."""

from __future__ import annotations

from typing import Any

from agentloop.config import AlgorithmConfig
from trainer.run.notices import algorithm_notices, algorithm_warnings


def test_waiting_for_the_whole_batch_and_unwise_choices_are_reported() -> None:
    def said(**keys: Any) -> str:
        algorithm = AlgorithmConfig.model_validate(keys)
        return " ".join(algorithm_notices(algorithm) + algorithm_warnings(algorithm))

    assert said() == ""
    assert "whitened" in said(advantage="reinforce_pp") and "last group" in said(advantage="reinforce_pp")
    assert said(advantage="reinforce_pp", whiten=False) == ""
    assert "proximal" in said(minibatches=2, correction={"decoupled": True})
    assert "proximal" in said(minibatches=2, correction={"mask": "token"})
    assert said(correction={"decoupled": True}) == ""
    assert "expected gradient of 0" in said(kl_coef=0.1, kl_estimator="k1")
    assert "without end" in said(shaping={"wrong_reward": -1, "turn_bonus": 0.1, "turn_bonus_cap": None})
