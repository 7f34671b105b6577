"""The trainer's rank on a fake card: it loads its shard, computes, steps, moves out for an engine and in again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from agentloop.config import TrainerConfig
from agentloop.config.loading import load_config
from agentloop.config.recipe import Recipe
from tests.fakecuda.cards import RANK, FakeCards
from tests.fakecuda.conftest import ModelFactory
from tests.fakecuda.full_size import VISION_LANGUAGE
from tests.fakecuda.material import samples_of
from trainer.learner.learner import Learner
from trainer.types import LearnerSettings, LossSpec, ValueSample

pytestmark = pytest.mark.fakecuda

CARD, HOST = torch.device("cuda", RANK), torch.device("cpu")

RECIPES = {
    "Qwen2.5-0.5B": "search/recipe.yaml",
    "Qwen2.5-3B": "gsm8k/recipe.yaml",
    "Qwen2.5-7B": "gsm8k/colocated.yaml",
    VISION_LANGUAGE: "geo3k/recipe.yaml",
}
"""Whose trainer section a model is trained with."""

FORWARD = {
    ("to card", "trainer/learner/learner.py"),  # the number of micro-batches, which ranks agree on
    ("to host", "trainer/learner/learner.py"),  # that number, and the sums of a micro-batch
    ("to card", "trainer/learner/losses/ratios.py"),
    ("to card", "trainer/learner/model/policy.py"),  # the micro-batch
    ("to card", "trainer/learner/model/varlen.py"),
}
"""All transfers of `accumulate`: none of them is in a layer."""

TOWER = {
    ("to card", "trainer/learner/model/vision.py"),  # patches and grids; transformers' order of windows
    ("to host", "trainer/learner/model/vision.py"),  # transformers reads the grids
    ("to host", "trainer/learner/model/sharding.py"),  # transformers reads the lengths of windows, once a block
    ("to card", ""),
    ("to host", ""),
}
"""Transfers of a vision tower, and of its blocks that run again in the backward pass."""


def settings(folder: Path, config: TrainerConfig, **options: Any) -> LearnerSettings:
    return LearnerSettings(str(folder), config, options.pop("dtype", "bfloat16"), total_steps=10, seed=0, **options)


def small(model: ModelFactory, changes: dict[str, Any], **options: Any) -> Learner:
    """A rank of a model with the widths of 0.5 B and two layers."""
    config = TrainerConfig.model_validate({"device": "cuda", "ranks": 8} | changes)
    return Learner(settings(model("Qwen2.5-0.5B", num_hidden_layers=2), config, **options))


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def homes(module: torch.nn.Module) -> set[torch.device]:
    """The devices of a model's parameters and buffers."""
    return {local(tensor).device for tensor in (*module.parameters(), *module.buffers())}


@pytest.mark.parametrize("name", RECIPES)
def test_a_rank_of_a_recipe_trains_and_publishes_on_its_card(
    cards: FakeCards, rank: None, model: ModelFactory, repo: Path, name: str
) -> None:
    recipe = load_config(Recipe, repo / "recipes" / RECIPES[name])
    image = name == VISION_LANGUAGE
    spec = LossSpec.from_config(recipe.trainer.algorithm)
    learner = Learner(settings(model(name), recipe.trainer, reference=bool(spec.kl_coef)))
    offloaded = recipe.trainer.fsdp.offload_reference
    assert homes(learner.policy) == {CARD}
    assert learner.reference is not None and homes(learner.reference) == ({CARD, HOST} if offloaded else {CARD})
    samples = samples_of(image=image)
    with cards.watch() as transfers:
        sums = learner.accumulate(samples, 1.0, spec)
    offloading = {("to card", "trainer/learner/model/policy.py"), ("to card", "trainer/learner/learner.py")}
    assert transfers <= (FORWARD | TOWER | offloading if image else FORWARD)
    assert (sums["sequences"], sums["tokens"]) == (4, 180)
    gradients = [local(p.grad) for p in learner.policy.parameters() if p.grad is not None]
    assert {(g.device, g.dtype) for g in gradients} == {(CARD, torch.float32)}
    assert len(gradients) == len(list(learner.policy.parameters()))
    assert set(learner.step(1.0)) == {"lr", "grad_norm"}
    for of in ("policy", "reference"):
        assert len(learner.logprobs(samples, 1.0, of).numbers) == 180
    published: dict[str, tuple[torch.device, torch.dtype, tuple[int, ...]]] = {}
    with cards.watch() as transfers:
        learner.publisher.tensors.gather(
            lambda spec, t: published.update({spec.name: (t.device, t.dtype, tuple(t.shape))})
        )
    assert transfers == set()
    assert published == {s.name: (CARD, torch.float32, s.shape) for s in learner.publisher.tensors.specs}
    assert cards.devices == {CARD}


def test_a_rank_trains_adapters_of_a_large_model(cards: FakeCards, rank: None, model: ModelFactory) -> None:
    config = TrainerConfig.model_validate(
        {"device": "cuda", "ranks": 8, "lora": {"rank": 16, "alpha": 32}, "fsdp": {"activation_checkpointing": True}}
    )
    learner = Learner(settings(model("Qwen2.5-7B"), config, reference=True))
    with cards.watch() as transfers:
        learner.accumulate(samples_of(), 1.0, LossSpec(kl_coef=0.01))
    assert transfers <= FORWARD
    trained = {name for name, p in learner.policy.named_parameters() if p.grad is not None}
    assert len(trained) == 2 * 7 * 28 and all("lora" in name for name in trained)
    learner.step(1.0)
    assert cards.devices == {CARD}


def test_a_rank_makes_room_for_an_engine_and_comes_back(cards: FakeCards, rank: None, model: ModelFactory) -> None:
    learner = small(model, {}, reference=True)
    samples, spec = samples_of(), LossSpec(kl_coef=0.01)

    def moments() -> set[torch.device]:
        states = learner.optimizer.state.values()
        return {local(value).device for state in states for value in state.values() if isinstance(value, Tensor)}

    for _ in range(2):
        learner.accumulate(samples, 1.0, spec)
        learner.step(1.0)
        assert learner.reference is not None
        learner.move_out(policy=False)
        assert (homes(learner.policy), homes(learner.reference), moments()) == ({CARD}, {HOST}, {HOST})
        learner.move_out(policy=True)
        assert homes(learner.policy) == {HOST}
        learner.move_in()
        assert (homes(learner.policy), homes(learner.reference), moments()) == ({CARD}, {CARD}, {CARD})


@pytest.mark.parametrize(
    ("changes", "spec"),
    [
        ({"attention": "plain"}, LossSpec(kl_coef=0.01)),
        ({"logprob_chunk": 64}, LossSpec(entropy_coef=0.01)),
        ({"lora": {"rank": 8, "alpha": 16}}, LossSpec(kl_coef=0.01)),
        ({"fsdp": {"offload_policy": True, "reduce_each_micro_batch": False}}, LossSpec()),
        ({"tokens_per_micro_batch": 256}, LossSpec(kind="gspo", importance="token", veto=0.1)),
    ],
    ids=["plain", "entropy", "lora", "offload", "micro-batches"],
)
def test_the_other_paths_of_a_step(
    cards: FakeCards, rank: None, model: ModelFactory, changes: dict[str, Any], spec: LossSpec
) -> None:
    learner = small(model, changes, reference=bool(spec.kl_coef))
    with cards.watch() as transfers:
        learner.accumulate(samples_of(), 0.7, spec)
    if "fsdp" not in changes:  # offloaded parameters are copied in each pass
        assert transfers <= FORWARD
    trained = [p for p in learner.policy.parameters() if p.requires_grad]
    home = HOST if "fsdp" in changes else CARD
    assert {local(p.grad).device for p in trained if p.grad is not None} == {home}
    learner.step(1.0)
    assert len(learner.logprobs(samples_of(), 1.0).numbers) == 180
    assert cards.devices == {CARD}


def test_float32_on_a_card_takes_no_flash_kernel(cards: FakeCards, rank: None, model: ModelFactory) -> None:
    learner = small(model, {}, dtype="float32")
    learner.accumulate(samples_of(), 1.0, LossSpec())
    learner.step(1.0)
    assert cards.devices == {CARD}


def test_flash_attn_gets_what_it_takes(
    cards: FakeCards, rank: None, model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(Path(__file__).with_name("stand_in"))
    learner = small(model, {"attention": "flash_attn"})
    learner.accumulate(samples_of(), 1.0, LossSpec())
    calls = sys.modules["flash_attn.flash_attn_interface"].calls
    # Two layers, each with its own segments and with the shared prompts.
    assert (calls.count("forward"), calls.count("backward")) == (4, 4)


def test_a_critic_trains_on_the_card(cards: FakeCards, rank: None, model: ModelFactory) -> None:
    learner = small(model, {"critic": {}, "algorithm": {"advantage": "gae"}})
    samples = [
        ValueSample(
            token_ids=one.token_ids, loss_mask=one.loss_mask, prompt_length=one.prompt_length, group_key=one.group_key,
            values=np.zeros(len(one.token_ids), np.float32), returns=np.ones(len(one.token_ids), np.float32),
        )
        for one in samples_of()
    ]  # fmt: skip
    assert len(learner.values(samples).numbers) == 180
    learner.accumulate_values(samples)
    learner.critic.step(1.0)
    assert homes(learner.critic.model) == {CARD} and cards.devices == {CARD}


def test_random_weights_are_drawn_for_a_card(cards: FakeCards, rank: None, model: ModelFactory) -> None:
    learner = small(model, {}, init="random")
    assert homes(learner.policy) == {CARD}
    learner.accumulate(samples_of(), 1.0, LossSpec())
    assert cards.devices == {CARD}
