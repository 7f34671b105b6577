"""The README's commands, in order, from a copy of the folder outside the repository; and every recipe's check."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from agentloop.config import Recipe
from agentloop.config.loading import load_config
from agentloop.trace.store import TraceStore
from trainer.console.console import Console
from trainer.run.preflight import prepare

pytestmark = pytest.mark.recipe

SHORT = ["run.steps=1", "eval.before_train=false", "eval.every=null", "rollout.batch_size=2", "rollout.group_size=2"]


@pytest.fixture(scope="module")
def readme(repo: Path) -> str:
    return (repo / "recipes" / "geo3k" / "README.md").read_text()


@pytest.fixture(scope="module")
def copied(readme: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands of the README's first block were run; training is shortened."""
    folder = tmp_path_factory.mktemp("newcomer")
    commands = [line.split("#")[0].split() for line in readme.split("```")[1].splitlines() if line.strip()]
    assert [command[:2] for command in commands[3:]] == [["agentloop", "train"]] * 2
    for command in commands:
        run(folder, [word if word != "hub" else "generated" for word in command] + SHORT * (command[1] == "train"))
    return folder


def run(folder: Path, command: list[str]) -> str:
    program = [sys.executable] if command[0] == "python" else [sys.executable, "-m", "agentloop"]
    done = subprocess.run(
        [*program, *command[1:]],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["geo3k-smoke", "geo3k-tools-smoke"])
def test_the_readmes_commands_train_on_images(copied: Path, name: str) -> None:
    metrics = [json.loads(line) for line in (copied / "outputs" / name / "metrics.jsonl").read_text().splitlines()]
    step = metrics[-1]
    assert step["step"] == 1 and step["mismatch/logprob_abs_mean"] < 1e-4
    records = list(TraceStore(copied / "outputs" / name).records(1, "train"))
    assert len(records) == 4
    for record in records:
        assert len(record.trajectory.images) == 1
        text = str(record.trajectory.messages)
        assert "Find" in text and ("calc_geo3k_reward" in text) is ("tools" in name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recipe", "recipe_tools", "smoke", "smoke_tools"])
def test_every_recipe_passes_the_checks_before_a_run_without_a_warning(
    copied: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the weights: those of the small model stand for them; and there are fewer generated rows than 512."""
    folder = copied / "my-geo3k"
    small = [f"model.path={folder / 'model'}", "rollout.batch_size=4"]
    recipe = load_config(Recipe, folder / f"{name}.yaml", small)
    with Console() as console:
        inputs = prepare(recipe, console)
    assert len(inputs.train) == 48 and "warning" not in "".join(capsys.readouterr())


@pytest.mark.slow
def test_the_small_model_is_fine_tuned_on_rows_with_images(copied: Path) -> None:
    from PIL import Image

    for number in range(3):
        Image.new("RGB", (60 + 30 * number, 50), "red").save(copied / f"{number}.png")
    rows = [
        {
            "messages": [
                {"role": "user", "content": "<image>Find x."},
                {"role": "assistant", "content": f"\\boxed{{{number}}}"},
            ],
            "images": [f"{number}.png"],
        }
        for number in range(3)
    ]
    (copied / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "run": {"name": "sft"},
        "model": {"path": "./my-geo3k/model"},
        "freeze_vision": False,
        "log_every": 1,
        "stages": [{"name": "a", "data": "./rows.jsonl", "steps": 8, "batch_size": 3, "optim": {"lr": 5e-3}}],
    }
    (copied / "sft.yaml").write_text(yaml.safe_dump(recipe))
    run(copied, ["agentloop", "sft", "--config", "sft.yaml"])
    lines = [json.loads(line) for line in (copied / "outputs" / "sft" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.3
    assert (copied / "outputs" / "sft" / "model" / "preprocessor_config.json").is_file()


def test_every_key_of_the_command_line_has_its_counterpart(readme: str, shared: Path, repo: Path) -> None:
    script = shared / "data" / "verl_command_lines" / "geo3k_grpo_qwen2_5_vl_7b.sh"
    keys = re.findall(r"^\s+([\w.]+)=", script.read_text(), re.MULTILINE)
    table = readme[readme.index("| verl | here |") :]
    assert len(keys) > 35 and [key for key in keys if f"`{key}" not in table] == []

    recipe = yaml.safe_load((repo / "recipes" / "geo3k" / "recipe.yaml").read_text())
    assert (recipe["rollout"]["batch_size"], recipe["rollout"]["group_size"], recipe["eval"]["every"]) == (512, 5, 5)
    algorithm, fsdp = recipe["trainer"]["algorithm"], recipe["trainer"]["fsdp"]
    assert (algorithm["kl_coef"], algorithm["kl_estimator"]) == (0.01, "low_var_kl")
    assert recipe["trainer"]["optim"]["lr"] == 1e-6
    assert (fsdp["activation_checkpointing"], fsdp["offload_policy"], fsdp["offload_reference"]) == (True, False, True)


def test_the_small_model_is_small(copied: Path) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(copied / "my-geo3k" / "model" / "model.safetensors")
    assert sum(tensor.size for tensor in tensors.values()) <= 1_200_000
