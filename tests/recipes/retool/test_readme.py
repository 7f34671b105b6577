"""The recipe as a newcomer uses it: the README's commands in order, with the real sandbox, shortened; and its table."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, chdir
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from agentloop.commands.main import build_app
from agentloop.config import Recipe, SftRecipe
from agentloop.config.loading import load_config
from agentloop.tool.loading import load_toolset
from agentloop.trace.store import TraceStore
from trainer.console.console import Console
from trainer.run.preflight import prepare

pytestmark = pytest.mark.recipe

SHORT = {
    "sft": ["stages.0.steps=80"],
    "train": [
        "run.steps=1", "eval.before_train=false", "eval.every=null", "rollout.batch_size=2", "rollout.group_size=2",
        "agents.tool_agent.max_assistant_turns=2", "agents.tool_agent.max_response_tokens=256",
    ],
}  # fmt: skip


def blocks(repo: Path) -> list[list[list[str]]]:
    """The words of the commands of each block of the README."""
    text = (repo / "recipes/retool/README.md").read_text()
    found = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [[line.split("  #")[0].split() for line in block.splitlines() if line.strip()] for block in found]


@pytest.fixture(scope="module")
def newcomer(repo: Path, tmp_path_factory: pytest.TempPathFactory, bubblewrap: None) -> Iterator[Path]:
    """A folder in which the commands of the first block were run; the sandbox has a port that is free."""
    folder = tmp_path_factory.mktemp("newcomer")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        for words in blocks(repo)[0]:
            command = [sys.executable, "-m", *words, *SHORT.get(words[1], [])]
            if words[-1] == "&":
                command[-2:] = ["0"]  # --port 8080 &
                server = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, env=environment)
                stack.callback(server.wait)
                stack.callback(server.kill)
                assert server.stdout is not None
                environment["SANDBOX_URL"] = server.stdout.readline().removeprefix("sandbox:").strip()
                continue
            if words[1] not in SHORT:  # a new process for each would cost most of the time
                with chdir(folder):
                    done_here = CliRunner().invoke(build_app(), words[1:], catch_exceptions=False)
                assert done_here.exit_code == 0, f"{words}\n{done_here.output}"
                continue
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
            assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        yield folder


@pytest.mark.slow
def test_the_readmes_commands_train_against_the_real_sandbox(newcomer: Path) -> None:
    lines = (newcomer / "outputs/retool-smoke/metrics.jsonl").read_text().splitlines()
    step = json.loads(lines[-1])
    assert step["step"] == 1 and step["episode/failed"] == 0 and step["mismatch/logprob_abs_mean"] < 1e-4
    records = list(TraceStore(newcomer / "outputs/retool-smoke").records(1, "train"))
    assert {record.trajectory.reward for record in records} <= {1.0, -1.0}
    results = [
        str(message["content"])
        for record in records
        for message in record.trajectory.messages
        if message["role"] == "tool"
    ]
    assert results, "the model of the fine-tuning calls the interpreter"
    assert any(result.strip().isdigit() or "Error" in result for result in results), results


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recipe", "smoke"])
def test_each_recipe_passes_the_checks_before_a_run_without_a_warning(
    newcomer: Path, shared: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the small model in place of Qwen3-4B, under Qwen3's own template; the generated rows are 64."""
    changes = [f"model.path={newcomer}/quickstart/model"]
    if name == "recipe":
        changes.append(f"model.chat_template={shared}/chat_templates/qwen3.jinja")
    recipe = load_config(Recipe, newcomer / f"my-retool/{name}.yaml", changes)
    with Console() as console:
        inputs = prepare(recipe, console)
    assert len(inputs.train) == 64 and "warning" not in "".join(capsys.readouterr())


def test_every_key_of_the_command_line_has_its_counterpart(repo: Path, shared: Path) -> None:
    script = shared / "data/verl_command_lines/retool_dapo_qwen3_4b.sh"
    given = dict(re.findall(r"^\s+([\w.]+)=(\S+) \\$", script.read_text(), re.MULTILINE))
    text = (repo / "recipes/retool/README.md").read_text()
    table = text[text.index("| verl | here |") :]
    assert len(given) > 50 and [key for key in given if f"`{key}" not in table] == []

    recipe = load_config(Recipe, repo / "recipes/retool/recipe.yaml", [])
    rollout, algorithm, agent = recipe.rollout, recipe.trainer.algorithm, recipe.agent("tool_agent")
    actor, multi_turn = "actor_rollout_ref.actor", "actor_rollout_ref.rollout.multi_turn"
    found = {
        "data.train_batch_size": rollout.batch_size,
        "actor_rollout_ref.rollout.n": rollout.group_size,
        "data.max_prompt_length": recipe.data.max_prompt_tokens,
        "data.max_response_length": agent.max_response_tokens,
        f"{multi_turn}.max_assistant_turns": agent.max_assistant_turns,
        f"{actor}.clip_ratio_low": algorithm.clip_ratio_low,
        f"{actor}.clip_ratio_high": algorithm.clip_ratio_high,
        f"{actor}.clip_ratio_c": algorithm.clip_ratio_c,
        f"{actor}.kl_loss_coef": algorithm.kl_coef,
        f"{actor}.ppo_mini_batch_size": rollout.batch_size // algorithm.minibatches,
        f"{actor}.optim.lr": recipe.trainer.optim.lr,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": rollout.gpus_per_replica,
        "actor_rollout_ref.rollout.val_kwargs.top_p": recipe.eval.sampling.top_p,
        "actor_rollout_ref.rollout.val_kwargs.temperature": recipe.eval.sampling.temperature,
        "actor_rollout_ref.rollout.val_kwargs.n": recipe.eval.n,
        "trainer.log_val_generations": recipe.eval.log_generations,
        "trainer.test_freq": recipe.eval.every,
        "trainer.total_epochs": recipe.run.epochs,
    }
    assert {key: float(value) for key, value in found.items() if value is not None} == {
        key: float(given[key]) for key in found
    }
    assert rollout.gpus_per_replica * rollout.replicas == recipe.trainer.ranks == int(given["trainer.n_gpus_per_node"])
    assert algorithm.advantage == given["algorithm.adv_estimator"] and recipe.eval.before_train
    assert recipe.model.path.startswith("Qwen/Qwen3-4B")


def test_the_readme_names_every_file_and_only_files_that_exist(repo: Path) -> None:
    folder = repo / "recipes/retool"
    text = (folder / "README.md").read_text()
    for file in (*folder.glob("*.yaml"), *folder.glob("*.py")):
        assert file.name == "__init__.py" or f"`{file.name}`" in text, file.name
    for name in re.findall(r"`(\w+\.(?:yaml|py))`", text):
        assert (folder / name).is_file(), name


def test_both_stages_show_the_model_the_same(repo: Path) -> None:
    """What the fine-tuning teaches has to be what the policy meets: template, thinking, tool."""
    folder = repo / "recipes/retool"
    first, second = load_config(SftRecipe, folder / "sft.yaml", []), load_config(Recipe, folder / "recipe.yaml", [])
    assert first.model.path == second.model.path
    assert first.model.chat_template_kwargs == second.model.chat_template_kwargs == {"enable_thinking": False}
    assert first.max_tokens > second.data.max_prompt_tokens + 5000


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://fusion.example:8080/run_code"])
def test_one_tool_yaml_serves_both_sandboxes(repo: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    file = repo / "recipes/retool/tools.yaml"
    monkeypatch.delenv("SANDBOX_URL", raising=False)
    assert list(load_toolset(file).tools) == ["code_interpreter"]
    monkeypatch.setenv("SANDBOX_URL", url)
    (tool,) = load_toolset(file).tools.values()
    assert tool.config["sandbox_url"] == url
    assert yaml.safe_load(file.read_text())["tools"][0]["tool_schema"]["function"]["name"] == tool.name
