"""Names in recipes and rows: a registered one wins, a file needs no package, a misspelt one is refused by name."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentloop.agent.loading import Agents
from agentloop.agent.tool_agent import ToolAgent
from agentloop.config import AgentConfig, Recipe
from agentloop.config.keys import known_keys, nearest
from agentloop.config.loading import load_config
from agentloop.data import load_tasks
from agentloop.errors import ConfigError, DataError, RegistryError, ToolConfigError, UserError
from agentloop.imports import load_from_file
from agentloop.interaction.loading import load_interactions
from agentloop.registry import REWARDS, TOOLS, load_reference
from agentloop.reward.loading import load_reward
from agentloop.tool.function import FunctionTool
from agentloop.tool.loading import load_toolset

MINIMAL = "run: {name: t, steps: 1}\nmodel: {path: ./model}\ndata: {train: ./rows.jsonl}\n"
AGENT = "from agentloop import AgentLoop\nclass MyAgent(AgentLoop):\n    async def run(self, episode):\n        pass\n"

CALCULATOR = "tools.calculator.Calculator"

Install = Callable[[str, str, str], None]


def recipe_in(folder: Path, text: str, *overrides: str) -> Recipe:
    (folder / "recipe.yaml").write_text(text)
    return load_config(Recipe, folder / "recipe.yaml", overrides)


def test_a_folder_of_the_name_does_not_hide_a_registered_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: Install
) -> None:
    install("guesses", "def guesses(): return [{'prompt': 'x'}]\n", "[agentloop.datasets]\nguess = guesses:guesses\n")
    monkeypatch.chdir(tmp_path)
    for name in ("gsm8k", "guess", "tool_agent"):
        (tmp_path / name).mkdir()
    text = MINIMAL.replace("./rows.jsonl", "guess") + "reward: gsm8k\n"
    for recipe in (recipe_in(tmp_path, text), recipe_in(tmp_path, MINIMAL, "reward=gsm8k", "data.train=guess")):
        assert recipe.reward is not None and recipe.reward.function == "gsm8k"
        assert load_reward(recipe.reward) is not None
        assert recipe.data.train == "guess" and recipe.data.default_agent == "tool_agent"
    assert len(load_tasks("guess", "data.train", "tool_agent")) == 1
    (tmp_path / "rows").mkdir()
    assert recipe_in(tmp_path, MINIMAL, "data.train=rows").data.train == str(tmp_path / "rows"), "not registered"
    assert recipe_in(tmp_path, MINIMAL, "data.train=./guess").data.train == str(tmp_path / "guess"), "written as a path"


def test_a_registered_name_may_have_dots(install: Install) -> None:
    install(
        "dotted", "def score(task, text, trajectory): return 1.0\n", "[agentloop.rewards]\nmy.score = dotted:score\n"
    )
    assert load_reference("my.score", Path(), REWARDS)(0, 0, 0) == 1.0


def test_an_agent_needs_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "agent.py").write_text(AGENT)
    text = MINIMAL.replace("data: {", "data: {default_agent: './agent.py:MyAgent', ")
    recipe = recipe_in(tmp_path, text + "agents: {guess: {class: ./agent.py:MyAgent, max_assistant_turns: 9}}\n")
    assert recipe.agent("guess").max_assistant_turns == 9
    agents = Agents(recipe.agents, recipe.folder)
    mine = agents.get("guess", "row 1")
    assert mine.__name__ == "MyAgent"
    assert agents.get(recipe.data.default_agent, "data.default_agent") is mine
    assert agents.get("./agent.py:MyAgent", "row 1") is mine, "relative to the recipe"
    assert agents.get("tool_agent", "row 1") is ToolAgent
    monkeypatch.chdir(tmp_path)
    override = recipe_in(tmp_path, MINIMAL, "agents.guess.class=agent.py:MyAgent", "agents.guess.max_user_turns=1")
    assert Agents(override.agents).get("guess", "row 1") is mine
    assert Recipe.model_validate_json(override.model_dump_json()).agents == override.agents
    assert override.plain()["agents"]["guess"]["class"] == f"{tmp_path / 'agent.py'}:MyAgent"


def test_a_row_names_a_class_beside_its_file(tmp_path: Path) -> None:
    (tmp_path / "agent.py").write_text(AGENT)
    (tmp_path / "rows.jsonl").write_text(
        '{"agent_name": "./agent.py:MyAgent", "prompt": [{"role": "user", "content": "x"}]}\n'
    )
    (task,) = load_tasks(str(tmp_path / "rows.jsonl"), "data.train", "tool_agent")
    assert Agents({}).get(task.agent_name, "row 1").__name__ == "MyAgent"


@pytest.mark.parametrize("name", ["5", "[1]", "{}", "true"])
def test_an_agent_name_is_text(tmp_path: Path, name: str) -> None:
    row = f'{{"agent_name": {name}, "prompt": [{{"role": "user", "content": "x"}}]}}\n'
    (tmp_path / "rows.jsonl").write_text(row)
    with pytest.raises(DataError, match=r"row 0 \(line 1\): column 'agent_name'"):
        list(load_tasks(str(tmp_path / "rows.jsonl"), "data.train", "tool_agent"))


def test_rows_of_the_hub_do_not_choose_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from agentloop.data.tasks import _agent

    with pytest.raises(DataError, match=r"names code to run.*\n.*agents\.<name>\.class"):
        _agent("/tmp/x.py:A", "hub:a/b, row 1", Path())
    assert _agent("tool_agent", "hub:a/b, row 1", Path()) == "tool_agent"


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        (
            "tool_agnet",
            RegistryError,
            r"row 1 has agent_name 'tool_agnet'; known: guess.*\n.*'tool_agent'",
        ),
        ("nobody", RegistryError, r"path\.py:Class"),
        ("./none.py:A", ConfigError, r"row 1: agent_name: .*none\.py does not exist"),
        ("./agent.py:MyAgnet", ConfigError, r"did you mean 'MyAgent'"),
        ("./agent.py:AgentLoop", RegistryError, "abstract"),
        ("./agent.py:AGENT", RegistryError, "not a subclass"),
        ("x" * 100_000, RegistryError, "…"),
    ],
)
def test_a_wrong_agent_names_the_row_and_the_fix(tmp_path: Path, name: str, error: type[Exception], says: str) -> None:
    (tmp_path / "agent.py").write_text(AGENT + "AGENT = 1\n")
    config = AgentConfig.model_validate({"class": str(tmp_path / "agent.py") + ":MyAgent"})
    with pytest.raises(error, match=says):
        Agents({"guess": config}, tmp_path).get(name, "row 1")


def test_a_misspelt_key_of_agents_is_refused(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, MINIMAL + "agents: {tool_agnet: {max_assistant_turns: 4}}\n")
    with pytest.raises(RegistryError, match=r"agents\.tool_agnet.*limits.*\n.*did you mean 'tool_agent'"):
        Agents(recipe.agents, recipe.folder)
    wrong = recipe_in(tmp_path, MINIMAL + "agents: {a: {class: ./none.py:A}}\n")
    with pytest.raises(ConfigError, match=r"agents\.a\.class: .*none\.py"):
        Agents(wrong.agents, wrong.folder)


@pytest.mark.parametrize(
    ("load", "text", "says"),
    [
        (load_toolset, "tools: [{class_name: gsm8k, confg: {}}]", "did you mean 'config'"),
        (load_toolset, "tools: [{class_name: gsm8k, tool_shcema: {}}]", "did you mean 'tool_schema'"),
        (load_toolset, f"tools: [{{class_name: {CALCULATOR}, tool_schema: {{function: x}}}}]", "no function"),
        (load_toolset, f"tools: [{{class_name: {CALCULATOR}, config: [1]}}]", "not a mapping"),
        (load_toolset, "tools: [{class_name: mine.lookup}]", r"path\.py:Class"),
        (load_toolset, "tools: [x]", "not a mapping"),
        (load_toolset, "tools: [{class_name: './fn.py:fine', config: {run_inn: thread}}]", "did you mean 'run_in'"),
        (load_toolset, "tools: [{class_name: './fn.py:fine', config: {workers: 9999999999}}]", "from 1 to 4096"),
        (load_interactions, "interaction: [{nmae: a, class_name: gsm8k}]", "did you mean 'name'"),
        (load_interactions, "interaction: [{name: a, class_name: gsm8k, config: 5}]", "not a mapping"),
        (load_interactions, "interaction: [{name: a, class_name: gsm8j}]", "did you mean 'gsm8k'"),
        (load_toolset, "tools: &a [*a]", "nested"),
        (load_toolset, "tools: [!!python/name:os.system x]", "line 1"),
    ],
)  # fmt: skip
def test_a_wrong_entry_of_a_list_is_named(tmp_path: Path, load: Any, text: str, says: str) -> None:
    (tmp_path / "fn.py").write_text(FUNCTIONS)
    file = tmp_path / "list.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        load(file)
    assert "list.yaml" in str(caught.value)


FUNCTIONS = '''
from typing import Any
def fine(city: str, days: int = 3) -> str:
    """Weather.

    Args:
        city: the city
        days: how many
    """
def untyped(city, days=3):
    """Weather.

    Args:
        city: the city
    """
def undescribed(city: str) -> str:
    """Weather."""
def undocumented(city: str) -> str:
    return city
def star(*args: str) -> str:
    """Weather."""
def keywords(**kwargs: str) -> str:
    """Weather."""
def positional(city: str, /) -> str:
    """Weather.

    Args:
        city: the city
    """
def unknown(city: "Nowhere") -> str:
    """Weather.

    Args:
        city: the city
    """
def odd(city: bytes) -> str:
    """Weather.

    Args:
        city: the city
    """
nameless = lambda city: city
'''


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("untyped", "argument city has no type hint"),
        ("undescribed", "Args:"),
        ("undocumented", "it has no docstring, which would describe it to the model"),
        ("star", r"\*args"),
        ("keywords", r"\*\*kwargs"),
        ("positional", "by its name"),
        ("unknown", "Nowhere"),
        ("odd", "bytes"),
        ("nameless", "def"),
    ],
)
def test_a_function_that_cannot_be_a_tool_says_what_it_lacks(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "fn.py").write_text(FUNCTIONS)
    (tmp_path / "tools.yaml").write_text(f"tools: [{{class_name: 'fn.py:{name}'}}]")
    with pytest.raises(ToolConfigError, match=says) as caught:
        load_toolset(tmp_path / "tools.yaml")
    assert "tools.yaml, tool 1" in str(caught.value) and "fix:" in str(caught.value)


def test_a_documented_function_is_a_tool(tmp_path: Path) -> None:
    (tmp_path / "fn.py").write_text(FUNCTIONS)
    tool = FunctionTool(load_reference("fn.py:fine", tmp_path, TOOLS))
    assert tool.schema["function"]["parameters"]["required"] == ["city"]


def test_two_recipes_import_their_own_helpers(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = tmp_path / name
        (folder / "parts").mkdir(parents=True)
        (folder / "helpers.py").write_text(f"import values\nNAME = {name!r} + values.LETTER\n")
        (folder / "values.py").write_text(f"LETTER = {name.upper()!r}\n")
        (folder / "parts" / "__init__.py").write_text("")
        (folder / "parts" / "deep.py").write_text("from helpers import NAME\nDEEP = NAME + '/deep'\n")
        (folder / "reward.py").write_text(
            "import json\nimport helpers\nfrom helpers import NAME\nimport parts.deep\nfrom parts import deep\n"
            "def score():\n    import helpers as again\n    from values import LETTER\n"
            "    return [helpers.NAME, NAME, parts.deep.DEEP, deep.DEEP, again.NAME, LETTER, json.dumps(1)]\n"
        )
    scores = [load_from_file(f"{tmp_path / name / 'reward.py'}:score", "reward") for name in ("a", "b")]
    assert [score() for score in scores] == [
        ["aA", "aA", "aA/deep", "aA/deep", "aA", "A", "1"],
        ["bB", "bB", "bB/deep", "bB/deep", "bB", "B", "1"],
    ]
    assert "helpers" not in sys.modules


def test_a_file_that_ends_the_process_when_imported_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("raise SystemExit(0)\n")
    with pytest.raises(ConfigError, match="SystemExit"):
        load_from_file(f"{tmp_path / 'reward.py'}:score", "reward")


def test_a_folder_that_hides_a_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "__init__.py").write_text("")
    for name in [name for name in sys.modules if name.split(".")[0] == "tools"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RegistryError, match=rf"cannot be imported.*\n.*{tmp_path}{os.sep}tools.* hides agentloop's"):
        load_reference("tools.missing.Calculator", Path(), TOOLS)
    for name in [name for name in sys.modules if name.split(".")[0] == "tools"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("name", ["tool.py", "tool.py:lookup"])
def test_a_python_file_in_place_of_a_tools_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "tool.py").write_text("def lookup(): ...\n")
    with pytest.raises(ToolConfigError, match="is a Python file, not a YAML file") as caught:
        load_toolset(tmp_path / name)
    assert "tools: [{class_name: ./tool.py:" in str(caught.value.hint)


def test_a_key_that_stands_one_section_deeper_is_named() -> None:
    known = list(known_keys(Recipe))
    assert nearest("rollout.max_new_tokens", known, "") == "did you mean 'rollout.sampling.max_new_tokens'?"
    assert nearest("rollout.replica", known, "") == "did you mean 'rollout.replicas'?"


def test_keys_that_are_equally_near_are_all_named() -> None:
    meant = nearest("agents.guess.max_turns", list(known_keys(Recipe)), "")
    assert meant == "did you mean 'agents.guess.max_user_turns' or 'agents.guess.max_assistant_turns'?"


def test_the_choice_that_a_misspelt_value_means_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'grpo'"):
        recipe_in(tmp_path, MINIMAL, "trainer.algorithm.advantage=grp")
    with pytest.raises(ConfigError) as caught:
        recipe_in(tmp_path, MINIMAL, "trainer.algorithm.advantage=zzzzzz")
    assert "did you mean" not in str(caught.value)
