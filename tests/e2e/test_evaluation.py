"""Evaluation and loggers in whole commands: beside training, and of a checkpoint afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentloop.trace.store import TraceStore


def test_a_run_that_evaluates_beside_training_and_the_evaluation_of_its_checkpoint(
    quickstart: Any, agentloop: Any, repo: Path
) -> None:
    pytest.importorskip("tensorboard")
    options = ("trainer.optim.lr=0.02", "eval.n=2", "eval.sampling.temperature=1.0", "eval.pass_reward=0.5")
    run = quickstart("run.steps=4", "eval.background=true", "loggers=[tensorboard]", *options)
    assert run.code == 0, run.err
    lines = {row["step"]: row for row in run.metrics if "eval/reward_mean" in row}
    assert sorted(lines) == [0, 2, 4] and len(run.metrics) == 7
    assert all(row["eval/version_min"] <= row["step"] <= row["eval/version_max"] for row in lines.values())
    assert lines[4]["eval/version_min"] == 4, "the last one has the trainer's last version to itself"
    assert {"eval/mean@2", "eval/pass@1", "eval/pass@2", "eval/maj@2"} <= lines[4].keys()
    assert run.out.count("eval  step") == 3
    assert list((run.dir / "loggers" / "tensorboard").glob("events.out.tfevents.*"))
    alone = agentloop(
        "eval", "--config", str(repo / "recipes" / "quickstart" / "recipe.yaml"), "--checkpoint", "4",
        "run.name=run", "eval.max_rows=8", *options,
    )  # fmt: skip
    assert alone.code == 0, alone.err
    folder = run.dir / "evaluations" / "step_4"
    found = json.loads((folder / "eval.json").read_text())
    for key in ("eval/reward_mean", "eval/response_tokens_mean", "eval/pass@2", "eval/maj@2"):
        assert found[key] == lines[4][key], "the same rows, seeds and weights"
    assert len(TraceStore(folder).records(4, "eval")) == 10
    assert "quickstart/arithmetic" in alone.out and not (folder / "weights").exists()
