"""The engine serves exactly what is in a model's files, or refuses by name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from agentloop import model_folder
from agentloop.config.server import ServerSettings
from agentloop.errors import ConfigError, ModelError
from rollout_server.engines.torch_engine.model.models import load_model
from rollout_server.replica.starting.sglang import sglang_command
from rollout_server.settings import check_model, load_settings

UP = "model.layers.1.mlp.up_proj.weight"
CODE = '{"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}'


@pytest.fixture
def damaged(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def load(folder: Path | str, **options: Any) -> Any:
    return load_model(str(folder), dtype=torch.float32, device=torch.device("cpu"), context_length=None, **options)


def change(folder: Path, changes: dict[str, Any]) -> None:
    """Replace tensors of the weights; None removes one."""
    tensors: dict[str, Any] = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({UP: None}, f"lack tensors of the model: {UP}"),
        ({"model.norm.weight": torch.full((64,), float("nan"))}, "NaN or infinite values: model.norm.weight"),
        ({"model.norm.weight": torch.full((64,), float("-inf"))}, "NaN or infinite values: model.norm.weight"),
        ({UP: torch.zeros(3, 3)}, f"another shape than config.json says: {UP}"),
        ({"model.layers.7.mlp.up_proj.weight": torch.zeros(3)}, "does not have: model.layers.7"),
    ],
)
def test_nothing_is_filled_with_random_numbers(damaged: Path, changes: dict[str, Any], says: str) -> None:
    size = json.loads((damaged / "config.json").read_text())["hidden_size"]
    fitted = {n: t[:1].expand(size).clone() if n == "model.norm.weight" else t for n, t in changes.items()}
    change(damaged, fitted)
    with pytest.raises(ModelError, match=re.escape(says)):
        load(damaged)


def test_large_finite_values_are_served(damaged: Path) -> None:
    """Their sum overflows."""
    size = json.loads((damaged / "config.json").read_text())["hidden_size"]
    change(damaged, {"model.norm.weight": torch.full((size,), 3e38)})
    load(damaged)


def test_a_model_with_code_of_its_own_is_refused_without_a_question(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": json.loads(CODE)}))
    (damaged / "own.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ModelError, match=r"own\.OwnConfig(.|\n)*--trust-remote-code"):
        load(damaged)


@pytest.mark.parametrize("path", ["/no/such/model", "./here", "a/b/c", "~/model"])
def test_a_path_is_never_asked_of_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    for find in (load, lambda name: check_model(ServerSettings(model=name))):
        with pytest.raises(ModelError, match=f"--model {re.escape(path)} does not exist"):
            find(path)


def test_a_broken_end_token_is_named(damaged: Path) -> None:
    (damaged / "tokenizer_config.json").write_text(
        '{"eos_token": "x", "added_tokens_decoder": {"y": {"content": "x"}}}'
    )
    with pytest.raises(ModelError, match=r"tokens that end a turn cannot be read from .*tokenizer_config\.json"):
        load(damaged)


def test_sglang_gets_only_whole_models(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang itself does not say which tensors it did not find; quantized checkpoints are its own matter."""
    compared: list[Path] = []
    monkeypatch.setattr(model_folder, "check_tensors", lambda folder, **_: compared.append(folder.path))
    settings = ServerSettings(model=str(damaged), engine="sglang")
    check_model(settings)
    assert compared == [damaged]

    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    check_model(settings)
    assert compared == [damaged]
    with pytest.raises(ModelError, match=r"is quantized \(fp8\)(.|\n)*--engine sglang"):
        check_model(settings.model_copy(update={"engine": "torch"}))


def test_sglang_runs_a_models_code_only_by_our_key(damaged: Path) -> None:
    plain = ServerSettings(model=str(damaged), engine="sglang")
    assert "--trust-remote-code" not in sglang_command(plain, 0, 1)
    assert "--trust-remote-code" in sglang_command(plain.model_copy(update={"trust_remote_code": True}), 0, 1)
    with pytest.raises(ConfigError, match=r"--engine-arg(.|\n)*trust_remote_code"):
        load_settings(ServerSettings, None, {"model": "m", "engine_args": ["--trust-remote-code"]})
