"""Every command that takes a recipe takes it as a word and with --config, and says what it cannot use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import agentloop
from agentloop.commands import main as program
from agentloop.commands.recipes import recipe_and_overrides
from agentloop.config import Recipe
from agentloop.errors import ConfigError, RunDirError
from trainer.commands.eval import MODEL, Subject, _folder_for
from trainer.run.rundir import RunDir


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the program in this process: its exit code, output and errors."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["agentloop", *words])
        with pytest.raises(SystemExit) as ended:
            program.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_the_recipe_is_a_word_or_an_option(tmp_path: Path) -> None:
    assert recipe_and_overrides(["a.yaml", "x=1"], None) == (Path("a.yaml"), ["x=1"])
    assert recipe_and_overrides(["x=1"], Path("a.yaml")) == (Path("a.yaml"), ["x=1"])
    odd = tmp_path / "a=b.yaml"
    odd.write_text("")
    assert recipe_and_overrides([str(odd)], None) == (odd, [])
    with pytest.raises(ConfigError, match=r"two recipes .* 'run\.steps'\n.*key=value"):
        recipe_and_overrides(["run.steps"], Path("a.yaml"))
    with pytest.raises(ConfigError, match=r"no recipe is given\n.*quickstart"):
        recipe_and_overrides(["x=1"], None)


@pytest.mark.parametrize("name", ["train", "sft"])
@pytest.mark.parametrize("form", [["quickstart"], ["--config", "quickstart"], ["-c", "quickstart"]])
def test_train_and_sft_take_both(command: Any, name: str, form: list[str]) -> None:
    code, out, err = command(name, *form, "run.name=5", "--dry-run")
    assert code == 0, err
    assert json.loads(out)["run"]["name"] == "5"


@pytest.mark.parametrize("form", [["quickstart"], ["--config", "quickstart"]])
def test_check_and_eval_take_both(command: Any, form: list[str]) -> None:
    for name in ("check", "eval"):
        code, _, err = command(name, *form, "model.path=/nowhere")
        assert code == 2 and "/nowhere does not exist" in err
    words = [word.replace("quickstart", "gsm8k") for word in form]
    code, _, err = command("prepare", *words, "--out", "x", "--source", "")
    assert code == 2 and "needs --source" in err


def test_check_of_an_sft_recipe_reads_every_row(command: Any, tmp_path: Path, quickstart_model: Path) -> None:
    text = f"model: {{path: {quickstart_model}}}\nstages: [{{name: a, data: ./rows.jsonl, steps: 1}}]\n"
    (tmp_path / "sft.yaml").write_text(text)
    code, _, err = command("check", str(tmp_path / "sft.yaml"))
    assert code == 2 and "rows.jsonl" in err
    row = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    code, out, err = command("check", str(tmp_path / "sft.yaml"))
    assert code == 0 and "1 row, " in out and "a run would start" in out, err
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + '\n{"messages": []}\n')
    code, _, err = command("check", str(tmp_path / "sft.yaml"))
    assert code == 2 and "row 1 (line 2)" in err


def test_a_recipe_given_to_the_wrong_command_names_the_right_one(command: Any, repo: Path) -> None:
    code, _, err = command("train", str(repo / "recipes/quickstart/sft.yaml"))
    assert code == 2 and "agentloop sft" in err
    code, _, err = command("sft", str(repo / "recipes/quickstart/recipe.yaml"))
    assert code == 2 and "agentloop train" in err


def test_a_run_directory_that_cannot_be_used_stops_the_run_first(command: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nope/x")):
        for name in ("train", "sft"):
            code, _, err = command(name, "quickstart", f"run.dir={folder}")
            assert code == 2 and "run directory" in err and "run.name" in err, err
    code, _, err = command("train", "quickstart", f"run.dir={tmp_path / ('x' * 300)}")
    assert code == 2 and "run.dir: a name in the path has more than 255 bytes" in err


def test_a_usable_run_directory_is_left_as_it_was(tmp_path: Path) -> None:
    RunDir(tmp_path / "a" / "b").check_writable()
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    RunDir(tmp_path / "a").check_writable()
    assert list((tmp_path / "a").iterdir()) == []


def test_an_earlier_evaluation_is_kept(tmp_path: Path) -> None:
    run = {"dir": str(tmp_path), "steps": 1}
    recipe = Recipe.model_validate({"run": run, "model": {"path": "m"}, "data": {"train": "t"}})
    folders = []
    for _ in range(3):
        folders.append(_folder_for(recipe, Subject(MODEL), None))
        folders[-1].mkdir(parents=True)
        (folders[-1] / "eval.json").write_text("{}")
    assert [folder.name for folder in folders] == ["model", "model-2", "model-3"]
    with pytest.raises(RunDirError, match="already holds an evaluation"):
        _folder_for(recipe, Subject(MODEL), folders[0])


def test_the_module_is_the_program() -> None:
    run = subprocess.run([sys.executable, "-P", "-m", "agentloop", "--help"], capture_output=True, text=True)
    assert run.returncode == 0 and "train" in run.stdout


def test_public_names_are_listed() -> None:
    assert {"rollout", "Episode", "Tool", "AgentLoop", "__version__"} <= set(dir(agentloop))


def test_missing_rows_of_a_recipe_with_data_py_name_the_command_that_writes_them(
    command: Any, tmp_path: Path, quickstart_model: Path
) -> None:
    (tmp_path / "data.py").write_text("def prepare(source, out):\n    pass\n")
    text = f"run: {{steps: 1}}\nmodel: {{path: {quickstart_model}}}\ndata: {{train: ./data/rows.jsonl}}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    code, _, err = command("check", str(tmp_path))
    hint = f"agentloop prepare {tmp_path} --source <folder or hub id> --out {tmp_path / 'data'}"
    assert code == 2 and "rows.jsonl does not exist" in err and hint in err
