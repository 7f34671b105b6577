"""The recipe as a newcomer uses it: a copy in an empty folder, the README's commands in order, with a tiny model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from agentloop.commands.prepare import prepare_rows
from agentloop.commands.recipes import copy_recipe
from agentloop.config import Recipe
from agentloop.config.loading import load_config
from trainer.commands.check import check_command
from trainer.console.console import Console
from trainer.run.preflight import prepare

CPU = [
    "rollout.engine=torch", "rollout.device=cpu", "rollout.replicas=1", "rollout.engine_args=[]", "rollout.first_gpu=0",
    "trainer.device=cpu", "trainer.ranks=1", "model.dtype=float32", "rollout.publish.transport=disk",
]  # fmt: skip
"""What a full-size recipe needs to run here."""

SMALL = [
    "run.steps=1", "rollout.batch_size=2", "rollout.group_size=2", "rollout.sampling.max_new_tokens=24",
    "agents.tool_agent.max_response_tokens=96", "eval.max_rows=2", "trainer.tokens_per_micro_batch=4096",
]  # fmt: skip
"""Shorten a run; the path stays the same."""


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside the repository in which nothing but the README's first commands have run."""
    folder = tmp_path_factory.mktemp("newcomer")
    copy_recipe("gsm8k", folder / "my-gsm8k")
    copy_recipe("quickstart", folder / "quickstart")
    prepare_rows(str(folder / "my-gsm8k"), "generated", folder / "my-gsm8k/data")
    return folder


def readme(repo: Path) -> list[str]:
    """All commands of the README, without their comments."""
    blocks = re.findall(r"^```\n(.*?)^```", (repo / "recipes/gsm8k/README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(("agentloop ", "python "))]


def run(folder: Path, command: str, *more: str) -> str:
    program, *words = command.split()
    python = [sys.executable, "-m"] if program == "python" else [str(Path(sys.executable).with_name("agentloop"))]
    words = words[1:] if program == "python" else words
    done = subprocess.run([*python, *words, *more], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def metrics(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "outputs" / name / "metrics.jsonl").read_text().splitlines()]


MORE: dict[str, Sequence[str]] = {
    "smoke.yaml": [*SMALL],
    "recipe.yaml": ["model.path=quickstart/model", *CPU, *SMALL],
    "colocated.yaml": ["model.path=quickstart/model", *CPU, *SMALL],
    "user.yaml": ["model.path=quickstart/model", *CPU, *SMALL],
    "twin/sft.yaml": ["stages.0.steps=2", "stages.1.steps=2", "stages.1.data=my-gsm8k/twin/data/drill.jsonl"],
    "twin/recipe.yaml": SMALL,
}
"""Changes to the README's commands for a test: `agentloop train --config my-gsm8k/NAME`."""


def test_the_readme_names_every_file_and_only_files_that_exist(repo: Path) -> None:
    folder = repo / "recipes/gsm8k"
    text = (folder / "README.md").read_text()
    for file in (*folder.glob("*.yaml"), *folder.glob("*.py")):
        assert file.name == "__init__.py" or f"`{file.name}`" in text, file.name
    for name in re.findall(r"`(\w+\.(?:yaml|py))`", text):
        assert (folder / name).is_file() or name == "user_train.parquet", name
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (folder / picture).is_file(), picture


@pytest.mark.recipe
def test_the_readmes_commands_run_in_order(repo: Path, newcomer: Path) -> None:
    ran = []
    for command in readme(repo):
        if command.startswith(("agentloop recipes copy", "agentloop prepare", "agentloop check")):
            continue  # the fixture did; checks of all files are below
        words = [word for word in command.split() if not word.startswith("rollout.python=")]
        changes = next(
            (MORE[name] for name in sorted(MORE, key=len, reverse=True) if f"my-gsm8k/{name}" in command), ()
        )
        run(newcomer, " ".join(words).partition(" --starts-below")[0], *changes)  # two steps keep no bounds
        ran.append(command.split()[1])
    assert ran == ["train"] * 5 + ["report", "-m", "sft"]

    for name in ("gsm8k-smoke", "gsm8k", "gsm8k-colocated", "gsm8k-user", "gsm8k-twin"):
        assert metrics(newcomer, name)[-1]["step"] == 1, name
        assert metrics(newcomer, name)[-1]["mismatch/logprob_abs_mean"] < 1e-4
    assert json.loads((newcomer / "outputs/gsm8k-colocated/logs/server.settings.json").read_text())["memory_saver"]
    assert metrics(newcomer, "gsm8k-user")[-1]["episode/user_turns_mean"] > 0
    assert (newcomer / "curve.svg").read_text().startswith("<svg ")


@pytest.mark.parametrize("name", ["recipe", "colocated", "user", "smoke", "twin/recipe"])
def test_every_yaml_passes_the_checks_before_a_run_without_a_warning(
    newcomer: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [] if name.startswith("twin/") else [f"model.path={newcomer}/quickstart/model"]  # the twin has its own
    recipe = load_config(Recipe, newcomer / f"my-gsm8k/{name}.yaml", [*model, "rollout.batch_size=32"])
    with Console() as console:
        inputs = prepare(recipe, console)
    assert len(inputs.train) >= 64 and "warning" not in "".join(capsys.readouterr())


def test_the_full_size_settings_are_those_that_are_published(repo: Path) -> None:
    for name in ("recipe", "colocated", "user"):
        recipe = load_config(Recipe, repo / f"recipes/gsm8k/{name}.yaml")
        rollout, algorithm = recipe.rollout, recipe.trainer.algorithm
        assert recipe.model.path == "Qwen/Qwen2.5-3B-Instruct" and rollout.engine == "sglang"
        assert (rollout.batch_size, rollout.group_size, recipe.trainer.optim.lr) == (256, 16, 1e-6)
        assert (algorithm.kl_coef, algorithm.kl_in, algorithm.kl_estimator) == (0.001, "loss", "low_var_kl")
        agent = recipe.agent("tool_agent")
        assert agent.max_assistant_turns == 5
        assert recipe.data.max_prompt_tokens == agent.max_response_tokens == 1024
        assert rollout.colocated is (name == "colocated")
        assert rollout.max_staleness == (0 if name == "colocated" else 1)


def test_the_warm_start_passes_the_checks_before_its_rows_are_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy_recipe("gsm8k", tmp_path / "fresh")
    assert check_command(tmp_path / "fresh/twin/sft.yaml", [], conversations=10) == 0
    said = "".join(capfd.readouterr())
    assert "no problem found" in said and "warning" not in said
