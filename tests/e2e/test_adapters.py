"""From LoRA fine-tuning to RL: the adapters are taken further, and the first served policy has them.

The recipes are those of recipes/smollm2, with the quickstart's model in place of the real one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

SMALL = [
    "rollout.batch_size=4", "rollout.group_size=2", "rollout.threads=1", "trainer.threads=1", "eval.max_rows=8",
    "trainer.algorithm.kl_coef=0.01", "trainer.lora.adapters=outputs/sft",
]  # fmt: skip


@pytest.mark.slow
def test_a_run_takes_the_adapters_of_fine_tuning_further(
    agentloop: Any, repo: Path, quickstart_model: Path, tmp_path: Path
) -> None:
    model = [f"model.path={quickstart_model}", "model.tool_role=tool"]
    sft, recipe = (str(repo / "recipes/smollm2" / name) for name in ("sft.yaml", "recipe.yaml"))

    # Large steps: a server with the base's weights would disagree with the trainer in step 1.
    stage = ["stages.0.steps=2", "stages.0.batch_size=2", "stages.0.optim.lr=0.02", "threads=1"]
    tuned = agentloop("sft", "--config", sft, *model, *stage, "run.name=sft", name="sft")
    assert tuned.code == 0, tuned.err
    run = agentloop("train", "--config", recipe, *model, *SMALL, "run.name=run", "run.steps=1")
    assert run.code == 0, run.err
    assert run.train_metrics[0]["mismatch/logprob_abs_mean"] < 1e-5

    # An evaluation of the recipe itself is one of the policy that the run started with.
    taken = agentloop("eval", "--config", recipe, *model, *SMALL, "run.name=evals", "--out", "taken")
    assert taken.code == 0, taken.err
    found, first = json.loads((tmp_path / "taken" / "eval.json").read_text()), run.metrics[0]
    for key in ("eval/reward_mean", "eval/response_tokens_mean", "eval/tool_calls_mean"):
        assert found[key] == first[key]
    assert found["checkpoint"].endswith("outputs/sft/checkpoints/step_2")
