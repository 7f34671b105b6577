"""The recipe as a newcomer uses it: the README's commands in order, with the real server, shortened."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, chdir
from pathlib import Path

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from agentloop.commands.main import build_app
from agentloop.config import Recipe
from agentloop.config.loading import load_config
from agentloop.tool.loading import load_toolset

pytestmark = pytest.mark.recipe

SHORT = {
    "sft": ["stages.0.steps=2"],
    "train": [
        "run.steps=1", "eval.before_train=false", "eval.every=null", "rollout.batch_size=2", "rollout.group_size=2",
        "agents.tool_agent.max_assistant_turns=2", "agents.tool_agent.max_response_tokens=64",
    ],
}  # fmt: skip

FEW_ROWS = """
from recipes.search.twin.data import conversations, copying
import random

def rows():
    return [copying(random.Random(0)), *conversations(20)]
"""
TWIN_SFT = ["stages.1.steps=2", "stages.0.data=few.py:rows", "stages.1.data=few.py:rows"]


def blocks(repo: Path) -> list[list[list[str]]]:
    """The words of the commands of each block of the README."""
    text = (repo / "recipes/search/README.md").read_text()
    found = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    found = [block.replace("\\\n", " ") for block in found]
    return [[line.split("  #")[0].split() for line in block.splitlines() if line.strip()] for block in found]


def run_block(folder: Path, block: list[list[str]], stack: ExitStack, ports: dict[str, str]) -> None:
    """Run the commands of a block in a folder, shortened; servers are up until the stack ends.

    Args:
        ports: port in the README -> port to use; the first one is the tool's own.
    """
    for written in block:
        words = [ports.get(word, word) for word in written]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "SEARCH_PORT": next(iter(ports.values()))}
        if words[0].startswith("SEARCH_PORT="):
            environment["SEARCH_PORT"] = ports[words[0].partition("=")[2]]
            words = words[1:]
        if words[:3] == ["python", "-m", "recipes.bounds"]:
            command = [sys.executable, *words[1:4]]  # one step keeps no bounds
        elif words[0] == "python":
            command = [sys.executable, *words[1:]]
        else:
            more = TWIN_SFT if words[-1].endswith("twin/sft.yaml") else []
            command = [sys.executable, "-m", *words, *SHORT.get(words[1], []), *more]
        if words[-1] == "&":
            command.remove("&")
            server = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, env=environment)
            stack.callback(server.wait)
            stack.callback(server.kill)
            assert server.stdout is not None
            port = words[words.index("--port") + 1]
            assert f"00 passages (bm25) at http://127.0.0.1:{port}/retrieve" in server.stdout.readline()
            continue
        if words[0] == "agentloop" and words[1] not in SHORT:  # a new process for each would cost most of the time
            with chdir(folder):
                done_here = CliRunner().invoke(build_app(), words[1:], catch_exceptions=False)
            assert done_here.exit_code == 0, f"{words}\n{done_here.output}"
            continue
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


@pytest.fixture(scope="module")
def port() -> str:
    """A free port, in place of the one in the README: two tests may run on one machine."""
    return free_port()


@pytest.fixture(scope="module")
def newcomer(repo: Path, port: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the commands of the first block were run; the server is still up."""
    folder = tmp_path_factory.mktemp("newcomer")
    with ExitStack() as stack:
        run_block(folder, blocks(repo)[0], stack, {"8390": port})
        yield folder


@pytest.mark.slow
def test_the_readmes_commands_train_against_the_real_server(newcomer: Path, port: str) -> None:
    lines = (newcomer / "outputs/search-smoke/metrics.jsonl").read_text().splitlines()
    step = json.loads(lines[-1])
    assert step["step"] == 1 and step["episode/failed"] == 0 and step["mismatch/logprob_abs_mean"] < 1e-4
    found = httpx.post(
        f"http://127.0.0.1:{port}/retrieve", json={"queries": ["Where was Ada Abel born?"], "topk": 1}
    ).json()["result"][0]
    assert found[0]["contents"].startswith('"Ada Abel"\n')


@pytest.mark.slow
def test_the_commands_of_the_twin_train_it_and_its_control(repo: Path, newcomer: Path) -> None:
    twin = [block for block in blocks(repo) if any("my-search/twin" in word for words in block for word in words)]
    (newcomer / "few.py").write_text(FEW_ROWS)
    ports = {"8391": free_port(), "8392": free_port()}
    with ExitStack() as stack:
        for block in twin:
            run_block(newcomer, block, stack, ports)
    for name in ("search-twin", "search-twin-shuffled"):
        (step,) = map(json.loads, (newcomer / f"outputs/{name}/metrics.jsonl").read_text().splitlines())
        assert step["step"] == 1 and step["episode/failed"] == 0 and step["mismatch/logprob_abs_mean"] < 1e-4
        assert step["episode/tool_errors_mean"] == 0
    assert (newcomer / "curve.svg").read_text().startswith("<svg ")
    assert (newcomer / "outputs/search-twin-sft/model/model.safetensors").is_file()


def test_the_readme_names_every_file_and_only_files_that_exist(repo: Path) -> None:
    folder = repo / "recipes/search"
    text = (folder / "README.md").read_text()
    for file in (*folder.glob("*.yaml"), *folder.glob("*.py")):
        assert file.name == "__init__.py" or f"`{file.name}`" in text, file.name
    for name in re.findall(r"`(\w+\.(?:yaml|py))`", text):
        assert (folder / name).is_file(), name


def test_the_recipe_is_the_published_setting(repo: Path) -> None:
    recipe = load_config(Recipe, repo / "recipes/search/recipe.yaml", [])
    assert recipe.model.path.startswith("Qwen/Qwen2.5-3B")
    assert (recipe.rollout.batch_size, recipe.rollout.group_size) == (512, 5)
    assert recipe.eval.before_train and recipe.eval.max_rows == 500
    (tool,) = yaml.safe_load((repo / "recipes/search/tools.yaml").read_text())["tools"]
    assert (tool["config"]["num_workers"], tool["config"]["rate_limit"], tool["config"]["timeout"]) == (120, 150, 30)


def test_the_smoke_tools_ask_the_port_of_the_readme_or_of_the_environment(
    repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "search serve my-search/data/index --port 8390" in (repo / "recipes/search/README.md").read_text()
    monkeypatch.delenv("SEARCH_PORT", raising=False)
    for port in ("8390", "8391"):
        (tool,) = load_toolset(repo / "recipes/search/smoke_tools.yaml").tools.values()
        assert tool.config["retrieval_service_url"] == f"http://127.0.0.1:{port}/retrieve"
        monkeypatch.setenv("SEARCH_PORT", "8391")


def test_the_smoke_tools_differ_in_size_only(repo: Path) -> None:
    full, small = (
        yaml.safe_load((repo / f"recipes/search/{name}.yaml").read_text())["tools"][0]
        for name in ("tools", "smoke_tools")
    )
    assert full["tool_schema"] == small["tool_schema"] and full["class_name"] == small["class_name"]
