"""`agentloop check --offline`: all but the weights, and without a model that only the hub has, all but the model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer

from agentloop.commands.prepare import prepare_rows
from agentloop.errors import DataError, ModelError, UserError
from trainer.commands import check_options
from trainer.commands.check import check_command

HUB = {
    "gsm8k": ["recipe.yaml", "colocated.yaml", "user.yaml"],
    "geo3k": ["recipe.yaml", "recipe_tools.yaml"],
    "retool": ["recipe.yaml", "sft.yaml"],
    "smollm2": ["recipe.yaml", "words.yaml", "sft.yaml", "words_sft.yaml"],
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `--offline` sets before huggingface_hub is imported."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def recipes(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of the recipes, as a user has them, with their rows."""
    folder = tmp_path_factory.mktemp("recipes")
    for name in HUB:
        shutil.copytree(repo / "recipes" / name, folder / name, ignore=shutil.ignore_patterns("data", "twin"))
        if name != "smollm2":  # its rows are functions
            prepare_rows(str(folder / name), "generated", folder / name / "data")
    return folder


@pytest.mark.parametrize("file", [f"{name}/{file}" for name, files in HUB.items() for file in files])
def test_a_recipe_whose_model_only_the_hub_has(recipes: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_command(recipes / file, [], conversations=2, offline=True) == 0
    said = capsys.readouterr().out
    assert "is not on this machine: " in said and "no problem found; the model" in said
    with pytest.raises(ModelError, match=r"could not be downloaded[\s\S]*fix: .*`agentloop check --offline`"):
        check_command(recipes / file, [], conversations=2)


def test_rows_and_code_are_checked_without_the_model(recipes: Path, tmp_path: Path) -> None:
    def check(*overrides: str) -> None:
        check_command(recipes / "gsm8k" / "recipe.yaml", list(overrides), conversations=2, offline=True)

    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": [{"role": "user", "content": "1"}], "agent_name": "nobody", "reward_model": {"ground_truth": "1"}}'
    )
    with pytest.raises(UserError, match="nobody"):
        check(f"data.train={tmp_path}/rows.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"prompt": [{"role": "user", "content": "1"}]}')
    with pytest.raises(DataError, match="ground_truth"):
        check(f"data.train={tmp_path}/rows.jsonl")
    with pytest.raises(DataError, match="does not exist") as missing:
        check("data.train=nothing.parquet")
    assert missing.value.hint is not None and "agentloop prepare" in missing.value.hint
    with pytest.raises(UserError, match="reward"):
        check("reward=./reward.py:nothing")
    with pytest.raises(ModelError, match="does not exist"):
        check(f"model.path={tmp_path}/nothing")


def test_a_model_that_is_here_is_checked_but_for_its_weights(
    repo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(repo / "recipes" / "quickstart" / "model", tmp_path / "model")
    for file in model.glob("*.safetensors"):
        file.unlink()
    recipe, path = repo / "recipes" / "quickstart" / "recipe.yaml", f"model.path={model}"
    assert check_command(recipe, [path], conversations=2, offline=True) == 0
    said = capsys.readouterr().out
    assert "prove chat template" in said and "no problem found; the weights were not checked" in said
    with pytest.raises(ModelError, match="safetensors"):
        check_command(recipe, [path], conversations=2)


def test_the_hub_is_offline_before_its_library_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library reads the variable at its import: the command sets it before it imports anything."""
    found: list[str | None] = []

    def check(*args: Any, **options: Any) -> int:
        found.append(os.environ.get("HF_HUB_OFFLINE"))
        return 0

    monkeypatch.setattr("trainer.commands.check.check_command", check)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for offline in (False, True):
        with pytest.raises(typer.Exit):
            check_options(["quickstart"], offline=offline)
    assert found == ["0", "1"]
