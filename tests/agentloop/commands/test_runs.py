"""A folder that is not a run: messages name the runs that are meant, also those below it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agentloop.commands import runs
from agentloop.commands.main import build_app
from agentloop.commands.runs import found_runs
from agentloop.config import LoraConfig
from agentloop.errors import RunDirError, UserError
from trainer.run.checkpoints import find_adapters
from trainer.run.rundir import RunDir


@pytest.fixture
def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    monkeypatch.chdir(tmp_path)

    def make(name: str) -> Path:
        config = Path(name) / "config" / "resolved.json"
        config.parent.mkdir(parents=True)
        config.write_text("{}")
        return Path(name)

    return make


def test_runs_below_a_folder_are_meant_rather_than_others(make_run: Callable[[str], Path]) -> None:
    make_run("outputs/other")
    make_run("outputs/smoke/tools/run")
    make_run("outputs/smoke/tools/run/inside")  # part of a run
    assert found_runs("fix", beside=Path("outputs/smoke/tools")) == "fix; found: outputs/smoke/tools/run"
    assert found_runs("fix", beside=Path("outputs/smoke")) == "fix; found: outputs/smoke/tools/run"
    assert found_runs("fix", beside=Path("outputs/nothing")).endswith("outputs/smoke/tools/run, outputs/other")
    make_run("elsewhere/mine")
    assert found_runs("fix", beside=Path("elsewhere/misspelt")).endswith("outputs/other, elsewhere/mine")


def test_a_search_ends_in_large_folders(make_run: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(9):
        make_run(f"outputs/group{number}/run")
    monkeypatch.setattr(runs, "LOOKED_AT", 12)
    assert found_runs("fix").count("/run") == 3
    assert found_runs("fix", beside=Path("x" * 300)).count("/run") == 3
    assert found_runs("fix", beside=Path("outputs/group1/run/config/resolved.json")).count("/run") == 3


@pytest.mark.parametrize(
    "words",
    [
        ["trace", "list", "{}"],
        ["trace", "show", "{}", "train:1:0:0:0"],
        ["trace", "diff", "{}", "train:1:0:0:0", "train:1:0:1:0"],
        ["trace", "export", "{}", "--format", "jsonl", "--out", "out.jsonl"],
        ["trace", "rescore", "{}", "--reward", "reward.py:score"],
        ["trace", "push", "{}", "--to", "otlp"],
        ["trace", "import", "{}"],
        ["report", "{}"],
        ["export", "{}", "--out", "out"],
    ],
)
def test_each_command_names_the_run_below_the_folder(words: list[str], make_run: Callable[[str], Path]) -> None:
    make_run("outputs/smoke/run")
    result = CliRunner().invoke(build_app(), [word.format("outputs/smoke") for word in words])
    assert isinstance(result.exception, UserError), (result.output, result.exception)
    assert str(result.exception).endswith(": outputs/smoke/run")


def test_resuming_and_adapters_name_it_too(make_run: Callable[[str], Path]) -> None:
    make_run("outputs/smoke/run")
    with pytest.raises(RunDirError, match=r"does not hold a run\n.*; found: .*outputs/smoke/run$"):
        RunDir(Path("outputs/smoke")).open({}, {}, resume=True)
    with pytest.raises(RunDirError, match=r"has no checkpoint\n.*; found: .*outputs/smoke/run$"):
        find_adapters(LoraConfig(adapters=Path("outputs/smoke")), "model")
