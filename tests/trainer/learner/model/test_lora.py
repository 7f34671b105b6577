"""Adapters: only they are trained and saved; what is published is one model without them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from agentloop.config import LoraConfig, TrainerConfig
from agentloop.errors import ConfigError, RunDirError
from tests.trainer.conftest import make_samples
from tests.trainer.learner.test_learner import learner, relative
from tests.trainer.models import save_tiny
from trainer.learner.export import export_checkpoint
from trainer.learner.learner import Learner
from trainer.learner.model.loading import load_sharded
from trainer.learner.model.lora import is_adapter
from trainer.learner.model.policy import PolicyModel
from trainer.types import LossSpec

pytestmark = pytest.mark.usefixtures("process_group")

LORA = {"rank": 4, "alpha": 8.0}
SPEC = LossSpec()


def trained(of: Learner, steps: int = 2) -> Learner:
    for step in range(steps):
        sums = of.accumulate(make_samples(seed=step), 1.0, SPEC)
        of.step(sums["tokens"])
    return of


def parameters(of: Learner) -> dict[str, torch.Tensor]:
    return {name: p.to_local().detach().clone() for name, p in of.policy.lm.named_parameters()}


def test_only_adapters_change(tiny_model: Path) -> None:
    of = learner(tiny_model, lora=LORA)
    before = parameters(of)
    trained(of)
    changed = {name for name, value in parameters(of).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if is_adapter(name)}
    assert len(changed) == 2 * 7 * 2, "A and B of seven layers in two blocks"
    optimized = sum(p.numel() for group in of.optimizer.param_groups for p in group["params"])
    assert optimized == sum(value.numel() for name, value in before.items() if is_adapter(name))


def test_a_policy_with_fresh_adapters_is_the_base(tiny_model: Path) -> None:
    samples = make_samples()
    assert np.array_equal(
        learner(tiny_model, lora=LORA).logprobs(samples, 1.0)[2], learner(tiny_model).logprobs(samples, 1.0)[2]
    )


def test_published_weights_are_merged_and_have_the_base_names(tiny_model: Path, tmp_path: Path) -> None:
    of = trained(learner(tiny_model, lora=LORA | {"exclude": ["down_proj"]}))
    of.publish(tmp_path / "v_1")
    published, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "v_1", tiny_model))
    assert published.keys() == base.keys()
    same = {name for name in base if torch.equal(base[name], published[name])}
    assert same == {name for name in base if "proj.weight" not in name or "down_proj" in name}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "v_1", dtype=torch.float32)
    samples = make_samples(seed=9)
    index, token, ours = of.logprobs(samples, 1.0)
    for i, sample in enumerate(samples):
        ids = torch.from_numpy(sample.token_ids)
        with torch.no_grad():
            theirs = torch.log_softmax(plain(input_ids=ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None])[:, 0]
        assert np.abs(ours[index == i] - theirs.numpy()[token[index == i] - 1]).max() < 1e-5


def test_adapters_are_merged_in_float32_before_the_cast(tiny_model: Path, tmp_path: Path) -> None:
    of = trained(learner(tiny_model, lora=LORA, dtype="bfloat16"))
    of.publish(tmp_path / "half")
    name = "model.layers.0.mlp.gate_proj"
    own = dict(of.policy.lm.named_parameters())
    a, b = (own[f"{name}.lora_{part}.default.weight"].to_local() for part in "AB")
    merged = own[f"{name}.base_layer.weight"].to_local() + 2.0 * b @ a
    assert torch.equal(load_file(tmp_path / "half" / "model.safetensors")[f"{name}.weight"], merged.bfloat16())


def test_the_gradient_is_that_of_the_merged_weight(tiny_model: Path) -> None:
    """dL/dB = factor dL/dW A^T, with dL/dW from a model whose weights are all trained."""
    samples = make_samples()
    of, whole = learner(tiny_model, lora=LORA), learner(tiny_model)
    for one in (of, whole):
        one.accumulate(samples, 1.0, SPEC)
    name = "model.layers.1.self_attn.q_proj"
    own, full = dict(of.policy.lm.named_parameters()), dict(whole.policy.lm.named_parameters())
    a = own[f"{name}.lora_A.default.weight"].to_local()
    expected = 2.0 * full[f"{name}.weight"].grad.to_local() @ a.T
    assert relative(own[f"{name}.lora_B.default.weight"].grad.to_local(), expected) < 1e-5


def test_the_reference_is_the_policy_without_its_adapters(tiny_model: Path) -> None:
    spec = LossSpec(kl_coef=0.1)
    plain, adapted = (learner(tiny_model, reference=True, **options) for options in ({}, {"lora": LORA}))
    assert adapted.reference is None, "no second copy"
    trained(adapted)
    samples = make_samples(seed=4)
    expected = learner(tiny_model).logprobs(samples, 1.0)[2]
    assert np.abs(adapted.logprobs(samples, 1.0, of="reference")[2] - expected).max() < 1e-6
    assert adapted.accumulate(samples, 1.0, spec)["kl_ref_sum"] > 1e-4
    assert plain.accumulate(samples, 1.0, spec)["kl_ref_sum"] == pytest.approx(0.0, abs=1e-6)


def test_a_checkpoint_holds_the_adapters_only_and_brings_the_run_back(tiny_model: Path, tmp_path: Path) -> None:
    straight = trained(learner(tiny_model, lora=LORA))
    straight.save(tmp_path / "step_2", {})
    size = sum(file.stat().st_size for file in (tmp_path / "step_2").rglob("*") if file.is_file())
    full = learner(tiny_model)
    trained(full).save(tmp_path / "full", {})
    assert size < 0.7 * sum(file.stat().st_size for file in (tmp_path / "full").rglob("*") if file.is_file())

    resumed = learner(tiny_model, lora=LORA, seed=7)
    resumed.load(tmp_path / "step_2" / "trainer", optimizer=True)
    first, second = (parameters(trained(of)) for of in (straight, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)

    only = learner(tiny_model, lora=LORA, seed=8)
    only.load(tmp_path / "step_2" / "trainer", optimizer=False)
    assert only.steps == 0
    with pytest.raises(RunDirError, match="another model"):
        learner(tiny_model).load(tmp_path / "step_2" / "trainer", optimizer=True)


def test_adapters_of_another_run_are_taken_further(tiny_model: Path, tmp_path: Path) -> None:
    """A run that starts with them is the merged model's, and so is its reference."""
    trained(learner(tiny_model, lora=LORA)).save(tmp_path / "step_2", {})
    further = learner(tiny_model, lora=LORA, seed=7, adapters=tmp_path / "step_2", reference=True)
    shutil.copytree(tiny_model, tmp_path / "base")
    export_checkpoint(
        tmp_path / "step_2" / "trainer", str(tmp_path / "base"), tmp_path / "merged", dtype="float32", lora_alpha=8.0
    )

    samples = make_samples(seed=9)
    start = learner(tmp_path / "merged").logprobs(samples, 1.0)[2]
    fresh = learner(tiny_model).logprobs(samples, 1.0)[2]
    assert np.abs(further.logprobs(samples, 1.0)[2] - start).max() < 1e-5
    assert np.abs(fresh - start).max() > 1e-3, "the adapters are not those of a new run"

    # A forward pass leaves the root's parameters gathered: the exchange must not read or keep them.
    assert further.accumulate(samples, 1.0, LossSpec(kl_coef=0.1))["kl_ref_sum"] == pytest.approx(0.0, abs=1e-6)
    further.step(1.0)
    trained(further)
    moved = further.logprobs(samples, 1.0)[2]
    assert np.abs(further.logprobs(samples, 1.0, of="reference")[2] - start).max() < 1e-5
    assert np.array_equal(further.logprobs(samples, 1.0)[2], moved) and np.abs(moved - start).max() > 1e-3
    assert further.accumulate(samples, 1.0, LossSpec(kl_coef=0.1))["kl_ref_sum"] > 1e-4


def test_adapters_that_do_not_fit_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    trained(learner(tiny_model, lora=LORA)).save(tmp_path / "step_2", {})
    with pytest.raises(RunDirError, match="another shape"):
        learner(tiny_model, lora=LORA | {"rank": 2}, adapters=tmp_path / "step_2")


def test_an_exported_checkpoint_is_what_was_published(tiny_model: Path, tmp_path: Path) -> None:
    of = trained(learner(tiny_model, lora=LORA | {"target_modules": ["q_proj", "up_proj"]}))
    of.publish(tmp_path / "v_2")
    of.save(tmp_path / "step_2", {})
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    saved = tmp_path / "step_2" / "trainer"
    export_checkpoint(saved, str(model), tmp_path / "out", dtype="float32", lora_alpha=8.0)
    published, exported = (load_file(tmp_path / name / "model.safetensors") for name in ("v_2", "out"))
    assert published.keys() == exported.keys()
    assert all(torch.equal(published[name], exported[name]) for name in published)
    with pytest.raises(RunDirError, match="has adapters"):
        export_checkpoint(saved, str(model), tmp_path / "other", dtype="float32")
    other = save_tiny(tmp_path / "llama", "llama", hidden_size=64)
    with pytest.raises(RunDirError, match="is not a checkpoint of"):
        export_checkpoint(saved, str(other), tmp_path / "other", dtype="float32", lora_alpha=8.0)


@pytest.mark.parametrize(
    "bad", [{"target_modules": ["q_project"]}, {"target_modules": ["q_proj"], "exclude": ["q_proj"]}]
)
def test_names_that_fit_nothing_are_refused_with_those_there_are(tiny_model: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="down_proj, gate_proj"):
        learner(tiny_model, lora=LORA | bad)


def test_adapters_go_where_they_are_asked_for_and_random_bases_have_them_too(tiny_model: Path) -> None:
    of = learner(tiny_model, lora=LORA | {"target_modules": ["q_proj", "v_proj"]})
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in parameters(of) if is_adapter(name)} == {
        "q_proj", "v_proj",
    }  # fmt: skip
    config = TrainerConfig(lora=LoraConfig())
    drawn = load_sharded(
        str(tiny_model), config, dtype="float32", init="random", seed=1, device=torch.device("cpu"), kind=PolicyModel
    )
    assert any(is_adapter(name) for name, _ in drawn.lm.named_parameters())
