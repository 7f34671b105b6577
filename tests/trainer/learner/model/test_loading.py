"""Every rank reads its rows, and what comes out is what transformers loads."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from agentloop.config import TrainerConfig
from agentloop.errors import ModelError
from tests.trainer.conftest import make_samples, start_workers
from tests.trainer.models import save_tiny
from trainer.learner.learner import Learner, LearnerSettings
from trainer.learner.model.loading import load_sharded
from trainer.learner.model.policy import PolicyModel
from trainer.types import LossSpec

pytestmark = pytest.mark.usefixtures("process_group")


def load(path: Path, init: Any = "weights", seed: int = 0, **config: Any) -> PolicyModel:
    return load_sharded(
        str(path),
        TrainerConfig(**config),
        dtype="float32",
        init=init,
        seed=seed,
        device=torch.device("cpu"),
        kind=PolicyModel,
    )


def values(lm: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those that are in no file included."""
    tensors = dict(lm.named_parameters()) | dict(lm.named_buffers())
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def assert_same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    a, b = values(ours), values(theirs)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma", "gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_each_tensor_and_buffer_is_that_of_from_pretrained(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_tiny(tmp_path / kind, kind)
    loader = AutoModelForImageTextToText if kind.endswith("vl") else AutoModelForCausalLM
    with caplog.at_level(logging.INFO, "trainer"):
        ours = load(folder).lm
    assert_same(ours, loader.from_pretrained(folder, dtype=torch.float32))
    assert "through transformers" not in caplog.text
    read = int(re.search(r"read (\d+) of the \d+ bytes", caplog.text)[1])
    assert read == sum(tensor.nbytes for file in folder.glob("*.safetensors") for tensor in load_file(file).values())


def test_tied_weights_are_one_parameter(tiny_model: Path) -> None:
    lm = load(tiny_model).lm
    assert lm.lm_head.weight is lm.model.embed_tokens.weight


def test_half_precision_files_become_float32_masters(tiny_model: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert_same(
        load(tmp_path / "half").lm, AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    )


def test_a_model_in_several_files_is_found_by_its_index(tiny_model: Path, tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    whole.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert_same(load(tmp_path / "many").lm, whole)
    next((tmp_path / "many").glob("model-00001*")).unlink()
    with pytest.raises(ModelError, match="which is missing"):
        load(tmp_path / "many")


def test_a_damaged_file_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match="cannot be read"):
        load(tmp_path / "cut")


def test_prefixes_of_earlier_releases_are_renamed_and_not_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_tiny(tmp_path / "vl", "qwen2_5_vl")
    new = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    old = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor.contiguous()
        for name, tensor in new.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    assert_same(load(folder).lm, new)
    assert "through transformers" not in caplog.text


def test_names_that_do_not_match_are_left_to_transformers(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A tied head that is in the files all the same: transformers decides what it means."""
    folder = tmp_path / "both"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ours = load(folder).lm
    assert "one tied tensor in the model" in caplog.text and "through transformers" in caplog.text
    assert_same(ours, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.mark.parametrize("case", ["missing", "unexpected", "shape", "lfs", "nan", "adapter"])
def test_files_that_are_not_the_models_are_refused_by_name(tiny_model: Path, tmp_path: Path, case: str) -> None:
    """transformers would fill what is missing with random numbers."""
    folder = tmp_path / "part"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if case == "missing":
        del tensors[name]
    elif case == "unexpected":
        name = "model.layers.2.mlp.up_proj.weight"
        tensors[name] = torch.zeros(64, 32)
    elif case == "shape":
        tensors[name] = torch.zeros(63, 32)
    elif case == "nan":
        tensors[name][5, 7] = float("nan")
    elif case == "adapter":
        (folder / "adapter_config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if case == "lfs":
        (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    says = {"lfs": "Git LFS pointer", "nan": "NaN or infinite.*" + name, "adapter": "LoRA adapter"}.get(case, name)
    with pytest.raises(ModelError, match=re.escape(says) if case not in ("nan",) else says):
        load(folder)


async def test_two_ranks_draw_and_train_what_one_does(tiny_model: Path, tmp_path: Path) -> None:
    """Random weights, and adapters whose rows lie on both ranks: published before and after a step."""
    config = TrainerConfig.model_validate({"optim": {"lr": 1e-2, "eps": 1.0}, "lora": {"rank": 3}})
    samples = make_samples()
    one = Learner(LearnerSettings(str(tiny_model), config, "float32", 1, 5, init="random"))
    one.publish(tmp_path / "one_0")
    sums = one.accumulate(samples, 1.0, LossSpec())
    one.step(sums["tokens"])
    one.publish(tmp_path / "one_1")
    workers = await start_workers(
        model_path=str(tiny_model), config=config.model_copy(update={"ranks": 2}), dtype="float32", total_steps=1,
        seed=5, log_dir=tmp_path / "logs", init="random",
    )  # fmt: skip
    try:
        await workers.publish(tmp_path / "two_0")
        await workers.accumulate(samples, temperature=1.0, loss=LossSpec())
        await workers.step(sums["tokens"])
        await workers.publish(tmp_path / "two_1")
    finally:
        await workers.close()
    for step, bound in ((0, 0.0), (1, 1e-7)):
        one_step, two_step = (load_file(tmp_path / f"{n}_{step}" / "model.safetensors") for n in ("one", "two"))
        assert one_step.keys() == two_step.keys()
        assert all((one_step[name] - two_step[name]).abs().max() <= bound for name in one_step)
    assert not torch.equal(
        one_step["model.layers.0.mlp.up_proj.weight"],
        load_file(tmp_path / "one_0" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"],
    )


def test_drawn_weights_are_spread_as_transformers_spreads_them(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "config"
    folder.mkdir()
    (folder / "config.json").write_text((tiny_model / "config.json").read_text())
    lm = load(folder, init="random", seed=3).lm
    spread = json.loads((folder / "config.json").read_text())["initializer_range"]
    for name, tensor in values(lm).items():
        if name.endswith("proj.weight") or "embed" in name:
            assert tensor.std().item() == pytest.approx(spread, rel=0.1), name
            assert abs(tensor.mean().item()) < 0.1 * spread
        elif "norm" in name:
            assert (tensor == 1).all()
        elif name.endswith("bias"):
            assert (tensor == 0).all()
    assert_same(lm, load(folder, init="random", seed=3).lm)
