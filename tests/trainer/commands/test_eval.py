"""What `agentloop eval` evaluates, and the table that it prints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from agentloop.config import Recipe
from agentloop.errors import ConfigError, ModelError, RunDirError, ServerStartError
from tests.agentloop.commands.trace.support import write_run
from trainer.checkpoint_files import seal
from trainer.commands.eval import Subject, eval_command, find_subject, kept_text, table


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe.model_validate(
        {"run": {"steps": 1, "dir": tmp_path / "run"}, "model": {"path": "m"}, "data": {"train": "d", "val": "d"}}
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The folder of a checkpoint, as a run leaves it."""
    folder = tmp_path / "run" / "checkpoints" / "step_4"
    (folder / "trainer").mkdir(parents=True)
    seal(folder, {"step": 4, "version": 4})
    return folder.resolve()


def test_a_checkpoint_is_named_by_step_or_folder(recipe: Recipe, checkpoint: Path) -> None:
    assert find_subject(recipe, None) == Subject("model")
    for named in ("4", "last", str(checkpoint), str(checkpoint.parent.parent)):
        assert find_subject(recipe, named) == Subject("step_4", 4, 4, checkpoint)


def test_a_folder_with_weights_stands_for_the_models_own(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(RunDirError, match="neither a run directory nor a checkpoint"):
        find_subject(recipe, str(tmp_path / "other"))
    (tmp_path / "other" / "model.safetensors").write_text("")
    assert find_subject(recipe, str(tmp_path / "other")) == Subject("other", weights=(tmp_path / "other").resolve())


def test_what_is_no_checkpoint_is_refused_with_those_that_are(recipe: Recipe, checkpoint: Path) -> None:
    with pytest.raises(RunDirError, match=r"has no checkpoint of step 9[\s\S]*existing checkpoints: 4"):
        find_subject(recipe, "9")
    with pytest.raises(RunDirError, match="does not exist"):
        find_subject(recipe, "elsewhere")
    recipe.rollout.url = "http://127.0.0.1:1"
    with pytest.raises(ConfigError, match="cannot be combined with"):
        find_subject(recipe, "4")


def test_the_command_that_lists_the_episodes_is_printed_with_how_many_were_kept(tmp_path: Path) -> None:
    run = write_run(tmp_path / "my run", steps=1)
    listed = f"episodes agentloop trace list '{run}'"
    assert kept_text(run, 1, 16.0) == f"{listed}   16 episodes, 1 kept: eval.log_generations"
    assert kept_text(run, 1, 1.0) == kept_text(run, 1, None) == listed


def test_the_table_has_a_line_for_each_source(capsys: Any) -> None:
    numbers = {"reward_mean": 0.5, "episodes": 8, "failed": 1, "pass@1": 0.25, "tool_calls_mean": 1.5}
    metrics: dict[str, Any] = {"version": 3, **{f"eval/{key}": value for key, value in numbers.items()}}
    metrics |= {f"eval/a/b/{key}": value for key, value in numbers.items()} | {"eval/a/b/reward_mean": None}
    metrics |= {"eval/time_s": 1.0, "eval/version_min": 3}
    Console(width=120).print(table(metrics))
    title, head, _, everything, source, *_ = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert "version 3" in title
    assert head.split() == ["rows", "episodes", "failed", "reward", "pass@1", "tools", "tokens"]
    assert everything.split() == ["all", "8", "1", "0.500", "0.250", "1.50", "–"]
    assert source.split() == ["a/b", "8", "1", "–", "0.250", "1.50", "–"]
    Console(width=120).print(table(metrics | {"eval/tool_errors_mean": 0.5}))
    _, head, _, everything, *_ = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert head.split()[-3:] == ["tools", "errors", "tokens"] and everything.split()[-3:] == ["1.50", "0.500", "–"]


def test_a_damaged_checkpoint_is_not_evaluated(recipe: Recipe, checkpoint: Path) -> None:
    (checkpoint / "trainer" / "__0_0.distcp").write_bytes(b"whole")
    seal(checkpoint, {"step": 4, "version": 4})
    (checkpoint / "trainer" / "__0_0.distcp").write_bytes(b"w")
    for named in ("4", "last", str(checkpoint)):
        with pytest.raises(RunDirError, match=r"__0_0\.distcp has 1 bytes instead of 5"):
            find_subject(recipe, named)
    (checkpoint / "state.json").write_text("{")
    with pytest.raises(RunDirError, match=r"state\.json is not JSON"):
        find_subject(recipe, "last")


@pytest.mark.parametrize("complete", [False, True])
def test_a_model_whose_tensors_do_not_fit_is_named_and_not_its_server(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complete: bool
) -> None:
    model = tmp_path / "model"
    shutil.copytree(repo / "recipes" / "quickstart" / "model", model)
    if not complete:
        tensors = load_file(model / "model.safetensors")
        del tensors[sorted(name for name in tensors if "layers.0" in name)[0]]
        save_file(tensors, model / "model.safetensors", {"format": "pt"})
    (tmp_path / "rows.jsonl").write_text('{"prompt": [{"role": "user", "content": "1"}]}\n')
    (tmp_path / "recipe.yaml").write_text(
        f"run: {{steps: 1, dir: {tmp_path}/run}}\nmodel: {{path: {model}}}\n"
        "data: {train: rows.jsonl, val: rows.jsonl, default_agent: single_turn_agent}\n"
    )

    async def fails(*_: Any) -> None:
        raise ServerStartError("the rollout server ended with code 1")

    monkeypatch.setattr("trainer.commands.eval._evaluate", fails)
    expected = ServerStartError if complete else ModelError
    with pytest.raises(
        expected, match="ended with code 1" if complete else "lack tensors of the model: model.layers.0"
    ):
        eval_command(tmp_path / "recipe.yaml", [], checkpoint=None, out=None)
