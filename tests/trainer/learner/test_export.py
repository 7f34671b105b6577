"""Exporting checkpoints: the same logits, whole folders, and what is said when something is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from agentloop.errors import ConfigError, ModelError, RunDirError
from trainer.commands.export import export_command, find_checkpoint
from trainer.learner.export import export_checkpoint
from trainer.run.rundir import RunDir

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # when a test saves without it

IDS = torch.arange(48).reshape(2, 24)


def logits_of(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


def save_run(root: Path, model: Path, steps: tuple[int, ...] = (2, 4), **changes: Any) -> RunDir:
    """A run directory whose checkpoints hold the model's weights times their step; no rank is started for it."""
    from transformers import AutoModelForCausalLM

    run = RunDir(root)
    run.open({"model": {"path": str(model), "dtype": "float32", "chat_template": None} | changes}, {}, resume=False)
    state = AutoModelForCausalLM.from_pretrained(model).state_dict()
    for step in steps:
        weights = {f"lm.{name}": tensor * step for name, tensor in state.items()}
        dcp.save({"model": weights}, checkpoint_id=run.checkpoint_of(step) / "trainer", no_dist=True)
        (run.checkpoint_of(step) / "state.json").write_text(json.dumps({"step": step, "version": step}))
        run.append_metrics({"step": step, "eval/reward_mean": 1 / step})
    return run


def export(source: Path, out: Path, **options: Any) -> int:
    return export_command(source, out, **{"step": None, "dtype": None, "model": None, "force": False, **options})


def test_the_exported_model_gives_the_logits_of_the_saved_one(tmp_path: Path, quickstart_model: Path) -> None:
    """That what several ranks saved is put together is shown by a fine-tuning with two (test_sft.py)."""
    from transformers import AutoModelForCausalLM

    run = save_run(tmp_path / "run", quickstart_model)
    tensors, out = run.checkpoint_of(4) / "trainer", tmp_path / "out"
    exported = export_checkpoint(tensors, str(quickstart_model), out, dtype="float32", shard_bytes=300_000)
    assert exported.files == len(list(out.glob("*.safetensors"))) > 1
    assert (out / "model.safetensors.index.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(quickstart_model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 4
        assert torch.equal(logits_of(out), model(IDS).logits)
    assert exported.parameters == sum(parameter.numel() for parameter in model.parameters())
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / file).read_bytes() == (quickstart_model / file).read_bytes(), file


def test_the_step_is_the_last_a_number_or_the_best(tmp_path: Path, quickstart_model: Path) -> None:
    run = save_run(tmp_path / "run", quickstart_model)
    assert find_checkpoint(run.root, None).step == find_checkpoint(run.checkpoints, "last").step == 4
    assert find_checkpoint(run.root, "2").step == find_checkpoint(run.root, "best").step == 2
    assert find_checkpoint(run.checkpoint_of(2), None).model["path"] == str(quickstart_model)
    with pytest.raises(RunDirError, match=r"no checkpoint of step 3(.|\n)*existing checkpoints: 2, 4"):
        find_checkpoint(run.root, "3")
    with pytest.raises(ConfigError, match="is not a step"):
        find_checkpoint(run.root, "newest")
    with pytest.raises(ConfigError, match="is already a single checkpoint"):
        find_checkpoint(run.checkpoint_of(2), "4")
    config = json.loads(run.config_file.read_text())
    run.append_metrics({"step": 4, "other": 1.0})
    run.config_file.write_text(json.dumps(config | {"checkpoint": {"best_metric": "other"}}))
    assert find_checkpoint(run.root, "best").step == 4
    run.config_file.write_text(json.dumps(config | {"stages": []}))
    with pytest.raises(RunDirError, match="was evaluated"):
        find_checkpoint(run.root, "best")
    run.append_metrics({"step": 2, "eval/loss": 1.0})
    run.append_metrics({"step": 4, "eval/loss": 2.0})
    assert find_checkpoint(run.root, "best").step == 2
    (run.checkpoint_of(2) / "state.json").unlink()
    with pytest.raises(RunDirError, match=r"has no state\.json"):
        find_checkpoint(run.checkpoint_of(2), None)
    shutil.rmtree(run.checkpoint_of(4))
    with pytest.raises(RunDirError, match=r"has no state\.json"):
        find_checkpoint(run.root, None)
    with pytest.raises(RunDirError, match="neither a run directory nor a checkpoint"):
        find_checkpoint(tmp_path, None)
    with pytest.raises(RunDirError, match="does not exist"):
        find_checkpoint(tmp_path / "none", None)


def test_the_folder_has_the_runs_chat_template_and_the_chosen_dtype(tmp_path: Path, quickstart_model: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}!")
    run = save_run(tmp_path / "run", quickstart_model, chat_template=str(tmp_path / "own.jinja"))
    assert export(run.root, tmp_path / "a" / "out", dtype="bfloat16") == 0
    weights = load_file(tmp_path / "a" / "out" / "model.safetensors")
    source = load_file(quickstart_model / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, (source[name] * 4).bfloat16()) for name, tensor in weights.items())
    assert json.loads((tmp_path / "a" / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a" / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x!"


def test_nothing_but_an_older_model_is_replaced_and_that_when_asked(tmp_path: Path, quickstart_model: Path) -> None:
    run = save_run(tmp_path / "run", quickstart_model)
    out = tmp_path / "out"
    assert export(run.root, out) == 0
    with pytest.raises(ConfigError, match=r"already holds a model(.|\n)*--force"):
        export(run.root, out, step="2")
    before = logits_of(out)
    assert export(run.root, out, step="2", force=True) == 0
    assert not torch.equal(logits_of(out), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    with pytest.raises(ConfigError, match="something other than a model"):
        export(run.root, run.root, force=True)
    with pytest.raises(ConfigError, match="the model that this one is made from"):
        export(run.root, quickstart_model, force=True)


def test_a_failed_export_leaves_nothing(tmp_path: Path, quickstart_model: Path) -> None:
    run = save_run(tmp_path / "run", quickstart_model)
    next(run.checkpoint_of(4).glob("trainer/*.distcp")).unlink()
    with pytest.raises(RunDirError, match=r"cannot be read: .*distcp(.|\n)*checkpoint.keep"):
        export(run.root, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, quickstart_model: Path, tiny_model: Path) -> None:
    run = save_run(tmp_path / "run", quickstart_model)
    with pytest.raises(
        RunDirError, match=r"embed_tokens.weight has the shape \[384, 128\], the model's has \[96, 32\]"
    ):
        export(run.root, tmp_path / "out", model=str(tiny_model))
    with pytest.raises(ModelError, match=r"the model that the run started from, .*gone does not exist"):
        export(run.root, tmp_path / "out", model=str(tmp_path / "gone"))
    state = {"model.lm.model.embed_tokens.weight.lora_A": torch.zeros(1)}
    dcp.save(state, checkpoint_id=tmp_path / "bare" / "trainer", no_dist=True)
    (tmp_path / "bare" / "state.json").write_text('{"step": 1, "version": 1}')
    with pytest.raises(RunDirError, match="its model is unknown"):
        export(tmp_path / "bare", tmp_path / "out")
    with pytest.raises(RunDirError, match="is missing"):
        export(tmp_path / "bare", tmp_path / "out", model=str(tiny_model))
    assert not (tmp_path / "out").exists()
