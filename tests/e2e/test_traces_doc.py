"""Every command of docs/traces.md is run: here on a finished run, or by the test that is named."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agentloop.commands.main import build_app

from .conftest import Run, run_agentloop

REPO = Path(__file__).resolve().parents[2]

PAGE = REPO / "docs" / "traces.md"

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

ELSEWHERE = ("serve", "push", "import")
"""Commands of `agentloop trace` that go on until they are stopped, or need a server or an older run:
other tests run them."""

HERE, MAKES_MODELS = ("list", "show", "diff", "export", "rescore"), ("export", "sft")
"""Commands of `agentloop trace` that the test runs, and others."""


def blocks(language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(PAGE.read_text()) if found == language]


def commands() -> list[str]:
    lines = [line for text in (*blocks(""), *blocks("bash")) for line in text.splitlines()]
    return [line.split("  #")[0].rstrip() for line in lines if line.startswith("agentloop ")]


@pytest.fixture(scope="module")
def folder(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run and the files that the page shows: blocks whose first line is `# NAME`."""
    place = tmp_path_factory.mktemp("page")
    shutil.copytree(finished.dir, place / "outputs" / "quickstart")
    for text in (*blocks("yaml"), *blocks("python")):
        named = re.match(r"# (\w+\.(?:yaml|py))\n", text)
        if named:
            (place / named[1]).write_text(text)
    return place


def test_the_commands_of_the_terminal_run_in_their_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    program, ran = build_app(), set()
    for line in commands():
        words = shlex.split(line)[1:]
        if words[0] in MAKES_MODELS or words[:2] in [["trace", name] for name in HERE]:
            if words[0] in MAKES_MODELS:
                done = run_agentloop(folder, *words)
                assert done.code == 0, f"{line}\n{done.err}"
            else:
                result = CliRunner().invoke(program, words)
                assert result.exit_code == 0, f"{line}\n{result.output}{result.exception!r}"
            ran.add(" ".join(words[: 2 if words[0] == "trace" else 1]))
            for option, file in pairwise(words):
                assert option != "--out" or (folder / file).stat().st_size > 0, line
    assert ran == {*(f"trace {name}" for name in HERE), *MAKES_MODELS}
    rows = [json.loads(line) for line in (folder / "good.jsonl").read_text().splitlines()]
    assert rows and all(row["tools"] and row["reward"] == 1 for row in rows)
    better = folder / "outputs" / "better"
    assert (better / "model" / "model.safetensors").is_file()
    # The model was trained towards such conversations: their loss is that of a model that knows them.
    metrics = [json.loads(line) for line in (better / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in metrics if "loss" in row]
    assert losses and losses[-1] < 1.0


def test_every_other_command_is_run_by_another_test() -> None:
    tests = [path.read_text() for path in (REPO / "tests" / "agentloop").rglob("*.py")]
    for line in commands():
        words = shlex.split(line)
        if words[1] == "trace" and words[2] not in HERE:
            assert words[2] in ELSEWHERE, line
            assert any(f'"{words[2]}"' in text and "trace" in text for text in tests), line


def test_the_page_names_every_rule() -> None:
    from agentloop.trace.signals import RULES

    text = PAGE.read_text()
    assert [name for name in RULES if f"`{name}`" not in text] == []
