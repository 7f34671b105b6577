"""A model folder is refused by the name of its file or tensor, before anything is loaded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from agentloop.errors import ModelError
from agentloop.model_folder import ModelFolder, check_files, check_tensors, find_model
from agentloop.model_folder.tensors import compare
from tests.agentloop.model_folder.conftest import Copy
from tests.trainer.models import FAMILIES, VISION, save_tiny

UP = "model.layers.1.mlp.up_proj.weight"
EMBED = "model.embed_tokens.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"


def _cut(copy: Copy) -> None:
    os.truncate(copy.weights, copy.weights.stat().st_size - 1000)


def _only_bin(copy: Copy) -> None:
    torch.save(load_file(copy.weights), copy.path / "pytorch_model.bin")
    copy.weights.unlink()


def _index(copy: Copy, mapping: Any) -> None:
    (copy.path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))


def _two_files(copy: Copy, mapping: dict[str, str]) -> None:
    """Split the weights; `mapping` is laid over the index of the parts."""
    tensors = load_file(copy.weights)
    copy.weights.unlink()
    parts = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    for part in set(parts.values()):
        save_file({name: tensors[name] for name in tensors if parts[name] == part}, copy.path / part)
    _index(copy, parts | mapping)


FILES: dict[str, tuple[Callable[[Copy], Any], str]] = {
    "lfs weights": (lambda c: c.weights.write_text(POINTER), r"model\.safetensors is a Git LFS pointer"),
    "lfs config": (lambda c: (c.path / "config.json").write_text(POINTER), r"config\.json is a Git LFS pointer"),
    "cut": (_cut, r"model\.safetensors cannot be read: it holds \d+ bytes, its header says \d+"),
    "empty file": (lambda c: c.weights.write_bytes(b""), r"model\.safetensors cannot be read"),
    "bin": (_only_bin, r"no model\.safetensors, only pytorch_model\.bin: such files are pickles"),
    "no weights": (lambda c: c.weights.unlink(), "holds no weights"),
    "no config": (lambda c: (c.path / "config.json").unlink(), r"config\.json cannot be read"),
    "config text": (lambda c: (c.path / "config.json").write_text("{"), r"config\.json is not a JSON object"),
    "config bytes": (lambda c: (c.path / "config.json").write_bytes(b"\xff\xfe{"), r"config\.json is not a JSON"),
    "config list": (lambda c: (c.path / "config.json").write_text("[]"), r"config\.json is not a JSON object"),
    "generation config": (lambda c: (c.path / "generation_config.json").write_text("{"), r"generation_config\.json is"),
    "tokenizer config": (lambda c: (c.path / "tokenizer_config.json").write_text("3"), r"tokenizer_config\.json is"),
    "no model type": (lambda c: c.config(model_type=None), "names no model_type"),
    "text size": (lambda c: c.config(vocab_size="many"), "vocab_size in .* is 'many', not a positive integer"),
    "text section": (lambda c: c.config(text_config=[1]), "text_config in .* is not an object"),
    "depth": (lambda c: c.config(num_hidden_layers=10**9), r"says num_hidden_layers 1000000000, but .* 26 tensors"),
    "quantized": (
        lambda c: c.config(quantization_config={"quant_method": "fp8"}),
        r"is quantized \(fp8\)(.|\n)*unquantized",
    ),
    "adapter": (lambda c: (c.path / "adapter_config.json").write_text("{}"), "holds a LoRA adapter"),
    "distributed": (
        lambda c: (c.path / "shard-00000-model-00001-of-00002.safetensors").write_bytes(b""),
        "holds a distributed checkpoint",
    ),
    "index without map": (lambda c: (c.weights.unlink(), _index(c, [])), r"index\.json has no weight_map"),
    "index to nothing": (lambda c: (c.weights.unlink(), _index(c, {"x": "y.safetensors"})), "y.safetensors, which is"),
    "index outside": (lambda c: (c.weights.unlink(), _index(c, {"x": "../y.safetensors"})), "outside its folder"),
    "both": (lambda c: _index(c, {"x": "config.json"}), "holds weights twice"),
    "index of another file": (lambda c: _two_files(c, {UP: "part-1.safetensors"}), rf"part-1\.safetensors lacks {UP}"),
    "index of too much": (lambda c: _two_files(c, {"other": "part-0.safetensors"}), "lacks other"),
    "named file outside": (lambda c: c.config(transformers_weights="../x.safetensors"), "outside its folder"),
    "named file missing": (lambda c: c.config(transformers_weights="x.safetensors"), "x.safetensors, which transf"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_are_refused_by_name(copied: Copy, case: str) -> None:
    damage, says = FILES[case]
    damage(copied)
    with pytest.raises(ModelError, match=says) as error:
        check_files(ModelFolder(copied.path))
    assert error.value.hint


def test_a_tensor_in_two_files_is_refused(copied: Copy) -> None:
    _two_files(copied, {})
    part = copied.path / "part-0.safetensors"
    tensors = load_file(part) | load_file(copied.path / "part-1.safetensors")
    save_file(tensors, part)
    with pytest.raises(ModelError, match="both hold"):
        check_files(ModelFolder(copied.path))


def test_an_adapter_folder_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"is a LoRA adapter, not a model(.|\n)*merge_and_unload"):
        ModelFolder.resolve(str(tmp_path))


def test_random_weights_need_no_files(copied: Copy) -> None:
    copied.weights.unlink()
    check_files(ModelFolder(copied.path), weights=False)


def test_an_unquantized_checkpoint_may_say_so(copied: Copy) -> None:
    copied.config(quantization_config={})
    check_files(ModelFolder(copied.path))


TENSORS: dict[str, tuple[Callable[[Copy], Any], str]] = {
    "missing": (lambda c: c.tensors(lambda t: t.pop(UP)), f"lack tensors of the model: {UP}"),
    "missing embedding": (lambda c: c.tensors(lambda t: t.pop(EMBED)), f"lack tensors of the model: .*{EMBED}"),
    "missing head": (lambda c: c.config(tie_word_embeddings=False), r"lack tensors of the model: lm_head\.weight"),
    "missing bias": (
        lambda c: c.tensors(lambda t: t.pop("model.layers.0.self_attn.q_proj.bias")),
        r"lack .*layers\.0\.self_attn\.q_proj\.bias",
    ),
    "many missing": (lambda c: c.tensors(lambda t: [t.pop(n) for n in list(t) if "layers.1" in n]), "and 9 more"),
    "unexpected": (
        lambda c: c.tensors(lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(2)})),
        r"does not have: model\.layers\.2\.mlp\.up_proj\.weight",
    ),
    "fewer layers": (lambda c: c.config(num_hidden_layers=1, layer_types=None), r"does not have: model\.layers\.1\."),
    "more layers": (lambda c: c.config(num_hidden_layers=3, layer_types=None), r"lack .*: model\.layers\.2\."),
    "vocabulary": (lambda c: c.config(vocab_size=400), rf"{EMBED} \(\[384, 128\], the model's: \[400, 128\]\)"),
    "shape": (lambda c: c.tensors(lambda t: t.update({UP: torch.zeros(3, 4)})), rf"{UP} \(\[3, 4\]"),
    "integers": (lambda c: c.tensors(lambda t: t.update({UP: t[UP].to(torch.int8)})), f"hold integers .*{UP}"),
    "unknown architecture": (lambda c: c.config(model_type="foo"), "model type `foo`"),
    "no language model": (lambda c: c.config(model_type="resnet"), "cannot be loaded"),
    "heads": (lambda c: c.config(num_attention_heads=0), "cannot be loaded"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_are_refused_by_name(copied: Copy, case: str, capfd: pytest.CaptureFixture[str]) -> None:
    damage, says = TENSORS[case]
    damage(copied)
    check_files(ModelFolder(copied.path))
    with pytest.raises(ModelError, match=says) as error:
        compare(ModelFolder(copied.path))
    assert error.value.hint
    assert capfd.readouterr() == ("", "")


SAME: dict[str, Callable[[Copy], Any]] = {
    "unchanged": lambda c: None,
    "half precision": lambda c: c.tensors(lambda t: t.update({n: v.bfloat16() for n, v in t.items()})),
    "untied": lambda c: (
        c.config(tie_word_embeddings=False),
        c.tensors(lambda t: t.update({"lm_head.weight": t[EMBED].clone()})),
    ),
    "tied under the other name": lambda c: c.tensors(lambda t: t.update({"lm_head.weight": t.pop(EMBED)})),
    "tied and stored twice": lambda c: c.tensors(lambda t: t.update({"lm_head.weight": t[EMBED].clone()})),
    "buffers of earlier releases": lambda c: c.tensors(
        lambda t: t.update({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(8) for i in (0, 1)})
    ),
    "without prefix": lambda c: c.tensors(
        lambda t: [t.update({n.removeprefix("model."): t.pop(n)}) for n in list(t) if n.startswith("model.")]
    ),
    "two files": lambda c: _two_files(c, {}),
    "one file with an index": lambda c: _index(c, dict.fromkeys(load_file(c.weights), "model.safetensors")),
    "a named file": lambda c: (
        c.weights.rename(c.path / "w.safetensors"),
        c.config(transformers_weights="w.safetensors"),
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_every_way_to_store_the_same_model_passes(copied: Copy, case: str) -> None:
    SAME[case](copied)
    check_files(ModelFolder(copied.path))
    compare(ModelFolder(copied.path))


@pytest.mark.parametrize("kind", [*FAMILIES, *VISION])
def test_every_family_is_compared(tmp_path: Path, kind: str) -> None:
    folder = ModelFolder(save_tiny(tmp_path / kind, kind))
    check_files(folder)
    compare(folder)
    tensors = load_file(folder.path / "model.safetensors")
    gone = sorted(name for name in tensors if "visual" in name or "mlp" in name)[0]
    del tensors[gone]
    save_file(tensors, folder.path / "model.safetensors")
    with pytest.raises(ModelError, match=f"lack tensors of the model: .*{re.escape(gone.removeprefix('model.'))}"):
        compare(ModelFolder(folder.path))


def test_experts_in_files_of_their_own_are_fused_by_transformers(tmp_path: Path) -> None:
    """Published mixtures hold one tensor an expert; transformers computes with one of all experts."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "intermediate_size": 8}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=32, head_dim=8, **sizes, **experts)).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.mlp.experts.3.down_proj.weight" in stored
    compare(ModelFolder(tmp_path))
    del stored["model.layers.0.mlp.experts.3.down_proj.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="experts"):
        compare(ModelFolder(tmp_path))


def test_the_comparison_runs_in_a_process_with_torch(copied: Copy) -> None:
    copied.tensors(lambda t: t.pop(UP))
    with pytest.raises(ModelError, match=f"lack tensors of the model: {UP}(.|\n)*download or save"):
        check_tensors(ModelFolder(copied.path))


def test_one_call_finds_checks_and_warns(copied: Copy) -> None:
    warnings: list[str] = []
    copied.config(auto_map={"AutoConfig": "own.OwnConfig"})
    find_model(str(copied.path), warnings.append, trust_remote_code=False)
    assert warnings == []
    folder = find_model(str(copied.path), warnings.append, trust_remote_code=True)
    assert folder.path == copied.path and "own.OwnConfig" in warnings[0]
    with pytest.raises(ModelError, match=r"--model /no/such/model does not exist"):
        find_model("/no/such/model", warnings.append, trust_remote_code=False, key="--model")
