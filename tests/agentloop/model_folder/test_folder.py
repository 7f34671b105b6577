"""One reader of model folders: facts of config.json, the hub, and folders that must not be replaced."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agentloop.errors import ConfigError, ModelError
from agentloop.model_folder import ModelFolder, check_target, copy_tokenizer


def folder_of(path: Path, config: object) -> ModelFolder:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return ModelFolder(path)


def test_facts_come_from_the_text_part(tmp_path: Path) -> None:
    text = {"vocab_size": 100, "hidden_size": 64, "max_position_embeddings": 512}
    plain = folder_of(tmp_path / "a", {"model_type": "qwen2", **text})
    nested = folder_of(
        tmp_path / "b", {"model_type": "qwen3_vl", "text_config": text, "vision_config": {}, "image_token_id": 7}
    )
    for folder in (plain, nested):
        assert (folder.vocab_size, folder.hidden_size, folder.context_length) == (100, 64, 512)
    assert (plain.takes_images, plain.image_token_id) == (False, None)
    assert (nested.takes_images, nested.image_token_id) == (True, 7)


def test_a_size_that_is_not_named_is_none(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {})
    assert (folder.vocab_size, folder.hidden_size, folder.context_length) == (None, None, None)


@pytest.mark.parametrize(("text", "says"), [(None, "cannot be read"), ("{", "not a JSON object"), ("3", "not a JSON")])
def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=f"config.json.*{says}"):
        _ = ModelFolder(tmp_path).config


def test_resolve_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        ModelFolder.resolve(str(tmp_path))
    with pytest.raises(ModelError, match="does not exist"):
        ModelFolder.resolve(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="not a folder and could not be downloaded from the hub"):
        ModelFolder.resolve("no-such/model-at-all")
    for key, of_recipe in (("model.path", True), ("--encoder", False), ("--model", False), ("model", False)):
        with pytest.raises(ModelError) as found:
            ModelFolder.resolve("no-such/model-at-all", key=key)
        assert ("recipe" in str(found.value.hint)) == of_recipe
    with pytest.raises(ModelError, match="tokenizer of no-such/model-at-all is not a folder and could not be downl"):
        copy_tokenizer("no-such/model-at-all", tmp_path)


def test_the_model_in_a_folder_without_one_is_named(tmp_path: Path) -> None:
    def fix(path: Path) -> str | None:
        with pytest.raises(ModelError, match=r"has no config\.json") as caught:
            ModelFolder.resolve(str(path))
        return caught.value.hint

    run = tmp_path / "my-sft"
    (run / "checkpoints").mkdir(parents=True)
    assert fix(run) == "give the folder of a Hugging Face model"
    (run / "config").mkdir()
    (run / "config" / "resolved.json").write_text("{}")
    assert f"agentloop export {run} --out <folder>" in str(fix(run))
    folder_of(run / "model", {})
    assert fix(run) == f"give the folder of a Hugging Face model; found: {run / 'model'}"

    for name in "abcd":
        folder_of(run / name, {})
    assert str(fix(run)).endswith(f"found: {run / 'a'}, {run / 'b'}, {run / 'c'}, ...")


def test_a_folder_is_resolved_to_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path / "model", {})
    monkeypatch.chdir(tmp_path)
    assert ModelFolder.resolve("model").path == tmp_path.resolve() / "model"


def test_only_an_earlier_model_may_be_replaced(tmp_path: Path) -> None:
    folder_of(tmp_path / "model", {})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    check_target(tmp_path / "new", replace=False, source="hub/id", key="out")
    check_target(tmp_path / "model", replace=True, source="hub/id", key="out")
    for out, replace, source, says in (
        ("model", False, "hub/id", "already holds a model"),
        ("model", True, str(tmp_path / "model"), "this one is made from"),
        ("other", True, "hub/id", "something other than a model"),
        ("other/notes.txt", True, "hub/id", "is a file"),
    ):
        with pytest.raises(ConfigError, match=f"out: .*{says}"):
            check_target(tmp_path / out, replace=replace, source=source, key="out")


def test_the_import_is_cheap() -> None:
    heavy = ("torch", "transformers", "huggingface_hub")
    code = f"import sys, agentloop.model_folder; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
