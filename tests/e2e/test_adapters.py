"""From LoRA fine-tuning to RL: the adapters are taken further, and the first served policy has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

SFT = """
run: {name: sft}
model: {path: MODEL}
lora: {rank: 4, alpha: 8}
stages: [{name: one, data: ./rows.jsonl, steps: 2, batch_size: 2, optim: {lr: 0.02}}]
max_tokens: 256
"""
ROW = {"messages": [{"role": "user", "content": "What is 12 * 34?"}, {"role": "assistant", "content": "#### 400"}]}


@pytest.mark.slow
def test_a_run_takes_the_adapters_of_fine_tuning_further(
    agentloop: Any, quickstart: Any, quickstart_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "sft.yaml").write_text(SFT.replace("MODEL", str(quickstart_model)))
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n" * 4)
    sft = agentloop("sft", "--config", "sft.yaml", name="sft")
    assert sft.code == 0, sft.err

    # Large steps: a server with the base's weights would disagree with the trainer in step 1.
    adapters = ("trainer.lora.rank=4", "trainer.lora.alpha=8", "trainer.lora.adapters=outputs/sft")
    run = quickstart("run.steps=1", "eval.every=null", "trainer.algorithm.kl_coef=0.01", *adapters)
    assert run.code == 0, run.err
    assert run.train_metrics[0]["mismatch/logprob_abs_mean"] < 1e-5

    # An evaluation of the recipe itself is one of the policy that the run started with.
    recipe = str(quickstart_model.parent / "recipe.yaml")
    taken = agentloop("eval", "--config", recipe, *adapters, "eval.max_rows=8", "run.name=evals", "--out", "taken")
    assert taken.code == 0, taken.err
    found, first = json.loads((tmp_path / "taken" / "eval.json").read_text()), run.metrics[0]
    for key in ("eval/reward_mean", "eval/response_tokens_mean", "eval/tool_calls_mean"):
        assert found[key] == first[key]
    assert found["checkpoint"].endswith("outputs/sft/checkpoints/step_2")
