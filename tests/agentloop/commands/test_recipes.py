"""Recipes are found by name, copied whole, and prepared by their own data.py."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from agentloop.commands.prepare import prepare_rows
from agentloop.commands.recipes import copy_recipe, find_config, find_recipe, installed_recipes
from agentloop.errors import ConfigError
from agentloop.imports import load_from_file
from agentloop.tool.loading import load_toolset


def test_every_folder_of_the_repository_is_an_installed_recipe(repo: Path) -> None:
    folders = {path.parent.name for path in (repo / "recipes").glob("*/recipe.yaml")}
    assert set(installed_recipes()) == folders >= {"gsm8k", "quickstart"}


@pytest.mark.parametrize("name", sorted(installed_recipes()))
def test_a_recipe_has_the_files_that_each_recipe_has(name: str) -> None:
    folder = installed_recipes()[name]
    for file in ("README.md", "recipe.yaml", "data.py", "reward.py", "tools.yaml"):
        assert (folder / file).is_file(), file
    assert (folder / "README.md").read_text().startswith("# ")


@pytest.mark.parametrize("name", sorted(installed_recipes()))
def test_a_copy_stands_alone(name: str, tmp_path: Path) -> None:
    copy = tmp_path / "mine"
    copy_recipe(name, copy)
    assert not list(copy.rglob("__*__*")) and not list(tmp_path.glob(".*"))
    assert {path.name for path in copy.iterdir()} >= {"README.md", "recipe.yaml", "data.py", "reward.py"}

    # What is changed in the copy is what runs: tools and rewards come from the copy, not from the package.
    score = load_from_file(f"{copy / 'reward.py'}:score", "reward")
    tools = load_toolset(copy / "tools.yaml")
    assert score.__code__.co_filename == str(copy / "reward.py")
    if name == "gsm8k":
        (tool,) = tools.tools.values()
        module = type(tool).execute.__globals__
        assert module["__file__"] == str(copy / "tool.py")
        assert module["compute_score"].__code__.co_filename == str(copy / "reward.py")


def test_a_copy_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="already exists"):
        copy_recipe("quickstart", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_two_copies_to_one_folder_leave_one_whole_copy(tmp_path: Path) -> None:
    results: list[str] = []

    def copy() -> None:
        try:
            copy_recipe("gsm8k", tmp_path / "mine")
            results.append("copied")
        except ConfigError:
            results.append("refused")

    threads = [threading.Thread(target=copy) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["copied", "refused", "refused", "refused"]
    assert (tmp_path / "mine" / "recipe.yaml").is_file() and len(list(tmp_path.iterdir())) == 1


def test_an_unknown_recipe_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no recipe 'nothing'[\s\S]*gsm8k, quickstart"):
        copy_recipe("nothing", tmp_path / "x")
    with pytest.raises(ConfigError, match=r"known names: .*gsm8k, quickstart"):
        find_recipe("nothing")
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        find_config(Path("quickstat"))


def test_a_config_is_a_file_a_folder_or_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quickstart = installed_recipes()["quickstart"]
    assert find_config(Path("quickstart")) == quickstart / "recipe.yaml"
    assert find_config(Path("quickstart"), "sft.yaml") == quickstart / "sft.yaml"

    # Reading a path that does not exist reports the error, with the files beside it.
    assert find_config(Path("missing/recipe.yaml")) == Path("missing/recipe.yaml")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert find_config(Path("quickstart")) == quickstart / "recipe.yaml", "a folder without a recipe hides nothing"
    (tmp_path / "quickstart" / "recipe.yaml").touch()
    assert find_config(Path("quickstart")) == Path("quickstart/recipe.yaml"), "what is in the working directory wins"


def test_prepare_asks_for_a_source_only_where_there_is_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gsm8k needs --source"):
        prepare_rows("gsm8k", None, tmp_path)
    with pytest.raises(ConfigError, match="takes no --source"):
        prepare_rows("quickstart", "somewhere", tmp_path)
    with pytest.raises(ConfigError, match=r"data\.py does not exist"):
        prepare_rows(str(tmp_path), None, tmp_path)


def test_a_folder_that_only_has_the_name_of_a_recipe_does_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gsm8k").mkdir()
    assert find_recipe("gsm8k") == installed_recipes()["gsm8k"]
    (tmp_path / "gsm8k" / "data.py").write_text("")
    assert find_recipe("gsm8k") == Path("gsm8k")


def test_prepare_calls_data_py_of_a_users_own_folder(tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text(
        "def prepare(out):\n    out.mkdir()\n    (out / 'rows.jsonl').write_text('{}\\n')\n"
        "    return {'rows.jsonl': 1}\n"
    )
    assert prepare_rows(str(tmp_path), None, tmp_path / "out") == {"rows.jsonl": 1}
    assert (tmp_path / "out" / "rows.jsonl").read_text() == "{}\n"


def test_files_of_two_recipes_may_have_the_same_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "reward.py").write_text(f"NAME = {name!r}\n")
        (folder / "tool.py").write_text("from .reward import NAME\n")
    assert [load_from_file(f"{tmp_path / name / 'tool.py'}:NAME", "tools") for name in ("a", "b")] == ["a", "b"]


def test_a_failed_import_names_the_line_and_no_internal_package(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("x = 1\n\nraise RuntimeError('boom')\n")
    (tmp_path / "tool.py").write_text("from .helpr import x\n")
    with pytest.raises(ConfigError, match=r"RuntimeError: boom\n.*reward\.py, line 3"):
        load_from_file(f"{tmp_path / 'reward.py'}:score", "reward")
    with pytest.raises(ConfigError, match=r"No module named 'helpr'\n.*tool\.py, line 1"):
        load_from_file(f"{tmp_path / 'tool.py'}:Tool", "tools")


def test_a_plain_file_that_has_the_name_of_a_recipe_does_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gsm8k").write_text("")
    assert find_recipe("gsm8k") == installed_recipes()["gsm8k"]
    assert find_config(Path("gsm8k")) == installed_recipes()["gsm8k"] / "recipe.yaml"


def test_a_folder_that_hides_the_installed_recipes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "__init__.py").write_text("")
    for name in [name for name in sys.modules if name.split(".")[0] == "recipes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="hides agentloop's package recipes"):
        find_config(Path("quickstart"))
