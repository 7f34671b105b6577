"""Recipes: accepted ones, and the messages for wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentloop.config import Recipe, SftRecipe
from agentloop.config.docs import describe
from agentloop.config.keys import known_keys
from agentloop.config.loading import load_config, resolve_override_path
from agentloop.errors import ConfigError

MINIMAL = "run: {name: t, steps: 1}\nmodel: {path: ./model}\ndata: {train: ./rows.jsonl}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_minimal_recipe_has_the_documented_defaults(tmp_path: Path) -> None:
    recipe = load_config(Recipe, write(tmp_path, MINIMAL))
    assert recipe.rollout.max_staleness == 0
    assert recipe.rollout.host == "127.0.0.1"
    assert recipe.agent("anything").max_assistant_turns == 4


def test_relative_paths_of_the_file_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe_dir = tmp_path / "recipe"
    recipe_dir.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    recipe = load_config(Recipe, write(recipe_dir, MINIMAL + "reward: ./reward.py:score\n"))
    assert recipe.model.path == str(recipe_dir / "model") or recipe.model.path == "./model"
    assert recipe.data.train == str(recipe_dir / "rows.jsonl")
    assert recipe.reward is not None and recipe.reward.function == str(recipe_dir / "reward.py") + ":score"


def test_relative_paths_of_an_override_are_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_dir = tmp_path / "recipe"
    recipe_dir.mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = load_config(Recipe, write(recipe_dir, MINIMAL), ["model.path=other", "data.train=rows2.jsonl"])
    assert recipe.model.path == str(tmp_path / "other")
    assert recipe.data.train == str(tmp_path / "rows2.jsonl")


def test_a_hub_id_stays_a_hub_id(tmp_path: Path) -> None:
    assert resolve_override_path("Qwen/Qwen3-0.6B", tmp_path) == "Qwen/Qwen3-0.6B"


def test_a_list_of_files_is_anchored_too(tmp_path: Path) -> None:
    text = MINIMAL.replace("./rows.jsonl", "[./a.jsonl, ./b.jsonl]")
    assert load_config(Recipe, write(tmp_path, text)).data.train == [
        str(tmp_path / "a.jsonl"),
        str(tmp_path / "b.jsonl"),
    ]


def test_interpolation_works(tmp_path: Path) -> None:
    recipe = load_config(Recipe, write(tmp_path, MINIMAL + "rollout: {group_size: 4, batch_size: '${.group_size}'}\n"))
    assert recipe.rollout.batch_size == 4


def test_overrides_win_and_are_typed(tmp_path: Path) -> None:
    recipe = load_config(
        Recipe,
        write(tmp_path, MINIMAL),
        ["run.steps=7", "trainer.optim.lr=3e-4", "agents.mine.max_assistant_turns=2"],
    )
    assert (recipe.run.steps, recipe.trainer.optim.lr) == (7, 3e-4)
    assert recipe.agent("mine").max_assistant_turns == 2


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("run.step=3", "run.steps"),
        ("lr=3", "trainer.optim.lr"),
        ("rollout.groupsize=3", "rollout.group_size"),
        ("nothing_like_it_at_all=1", "agentloop config"),
    ],
)
def test_an_unknown_override_names_the_nearest_key(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Recipe, write(tmp_path, MINIMAL), [override])
    assert override.split("=")[0] in str(caught.value)
    assert says in str(caught.value)


def test_an_unknown_key_in_the_file_names_the_nearest_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'rollout.grup_size'; did you mean 'rollout.group_size'"):
        load_config(Recipe, write(tmp_path, MINIMAL + "rollout: {grup_size: 4}\n"))


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL)
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        load_config(Recipe, tmp_path / "recpie.yaml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [1, 2", "not valid YAML"),
        ("- 1\n- 2\n", "is not a mapping"),
        (MINIMAL + "seed: x\n", "seed"),
        ("run: {name: t, steps: 1}\ndata: {train: x.jsonl}\n", "'model' is missing"),
        (MINIMAL + "rollout: {batch_size: '${nowhere}'}\n", "nowhere"),
        (MINIMAL.replace("steps: 1", "steps: null"), "set run.steps or run.epochs"),
        (MINIMAL + "rollout: {batch_size: 5}\ntrainer: {algorithm: {minibatches: 2}}\n", "not a multiple"),
        (MINIMAL + "rollout: {group_size: 1}\ntrainer: {algorithm: {advantage: rloo}}\n", "group_size >= 2"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Recipe, write(tmp_path, text))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("algorithm", "says"),
    [
        ("aggregation: constant", "aggregation_constant"),
        ("aggregation_constant: 8", "aggregation=constant"),
        ("kl_in: reward", "needs a kl_coef above 0"),
        ("kl_target: 0.1", "needs a kl_coef above 0"),
        ("kl_coef: 0.1, kl_in: reward, advantage: grpo_process", "use kl_in=loss"),
        ("gamma: 0.9", "not by advantage=grpo"),
        ("lam: 0.9, advantage: reinforce_pp", "lam is read by gae"),
        ("loss: gspo, clip_ratio_c: 3", "read by ppo_clip"),
        ("correction: {importance: token}", "needs decoupled=true"),
        ("correction: {mask: token, mask_low: 6}", "not below mask_high 5"),
        ("shaping: {turn_bonus: 0.1}", "wrong_reward=-1"),
        ("shaping: {wrong_reward: -0.1, turn_bonus: 0.1}", "below wrong_reward"),
        ("shaping: {overlong_buffer: 256}", "not below agents.tool_agent.max_response_tokens 256"),
        ("advantage: reinforce_pp, dynamic_sampling: 1", "dynamic_sampling needs rollout.group_size >= 2"),
        ("advantage: gae", "set trainer.critic"),
        ("advantage: reinforce_pp_baseline", "reinforce_pp_baseline needs rollout.group_size >= 2"),
    ],
)
def test_algorithm_keys_that_do_not_go_together_are_refused(tmp_path: Path, algorithm: str, says: str) -> None:
    size = 1 if "group_size" in says else 8
    text = f"rollout: {{group_size: {size}}}\ntrainer: {{algorithm: {{{algorithm}}}}}\n"
    with pytest.raises(ConfigError) as caught:
        load_config(Recipe, write(tmp_path, MINIMAL + text))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("trainer", "says"),
    [
        ("critic: {}", "not by advantage=grpo"),
        ("algorithm: {advantage: gae}, critic: {critic_warmup: 1}", "leaves no step of run.steps 1"),
    ],
)
def test_a_critic_that_makes_no_sense_is_refused(tmp_path: Path, trainer: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Recipe, write(tmp_path, MINIMAL + f"trainer: {{{trainer}}}\n"))
    assert says in str(caught.value)


@pytest.mark.parametrize("override", ["novalue", "=3", "a.b.c"])
def test_an_override_that_is_no_assignment_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="key=value"):
        load_config(Recipe, write(tmp_path, MINIMAL), [override])


def test_all_errors_of_a_file_are_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 errors"):
        load_config(Recipe, write(tmp_path, MINIMAL + "sead: 1\nrollout: {replicas: 0}\n"))


def test_parts_draw_from_seeds_of_their_own(tmp_path: Path) -> None:
    recipe = load_config(Recipe, write(tmp_path, MINIMAL), ["seed=1"])
    assert len({recipe.seed_for("data"), recipe.seed_for("rollout"), recipe.seed_for("trainer")}) == 3
    assert load_config(Recipe, write(tmp_path, MINIMAL), ["rollout.seed=77"]).seed_for("rollout") == 77


@pytest.mark.parametrize("model", [Recipe, SftRecipe])
def test_every_key_is_documented(model: type[Recipe] | type[SftRecipe]) -> None:
    lines = list(describe(model))
    described = {line.split(" = ")[0] for line in lines if " = " in line}
    for line in lines:
        if " = " in line:
            key, meaning = line.split(" = ")[0], line.split("# ")[1]
            assert meaning != key.split(".")[-1], f"{key} has no description"
    places = {"agents": "<name>"}  # the others are lists
    leaves = {key.replace("*", places.get(key.split(".")[0], "<n>")) for key in known_keys(model)}
    assert described <= leaves


def test_the_reference_is_what_make_docs_writes(repo: Path) -> None:
    text = (repo / "docs" / "config.md").read_text()
    for line in [*describe(Recipe), *describe(SftRecipe)]:
        assert line in text, "run `make docs`"


def test_one_section_can_be_printed() -> None:
    lines = list(describe(Recipe, "trainer.optim"))
    assert lines and all("trainer" in line for line in lines)


def test_a_key_of_an_earlier_version_that_nothing_replaces_is_named_with_its_fix(tmp_path: Path) -> None:
    wanted = r"unknown key 'trace.queue_mb'(?s:.*)remove it"
    with pytest.raises(ConfigError, match=wanted):
        load_config(Recipe, write(tmp_path, MINIMAL), ["trace.queue_mb=100"])
    (tmp_path / "file").mkdir()
    with pytest.raises(ConfigError, match=wanted):
        load_config(Recipe, write(tmp_path / "file", MINIMAL + "trace: {queue_mb: 100}\n"), [])


def test_a_limit_of_an_earlier_version_names_the_new_key(tmp_path: Path) -> None:
    wanted = r"unknown key 'trace.max_trajectories'(?s:.*)did you mean 'trace.max_bytes_per_step'"
    with pytest.raises(ConfigError, match=wanted):
        load_config(Recipe, write(tmp_path, MINIMAL), ["trace.max_trajectories=100"])
    (tmp_path / "file").mkdir()
    with pytest.raises(ConfigError, match=wanted):
        load_config(Recipe, write(tmp_path / "file", MINIMAL + "trace: {max_trajectories: 100}\n"), [])


def test_limits_of_an_agent_in_a_file_hold_for_the_path_that_rows_name(tmp_path: Path) -> None:
    named = MINIMAL.replace("rows.jsonl", 'rows.jsonl, default_agent: "./agent.py:Mine"')
    recipe = load_config(Recipe, write(tmp_path, named + 'agents: {"./agent.py:Mine": {max_response_tokens: 77}}\n'))
    assert recipe.agent(recipe.data.default_agent).max_response_tokens == 77
    assert recipe.agent(f"{tmp_path.resolve() / 'agent.py'}:Mine").max_response_tokens == 77
    twice = f'agents: {{"./agent.py:Mine": {{}}, "{tmp_path.resolve()}/agent.py:Mine": {{}}}}\n'
    with pytest.raises(ConfigError, match="two keys name"):
        load_config(Recipe, write(tmp_path, MINIMAL + twice))


@pytest.mark.parametrize(
    ("text", "says", "fix"),
    [
        (
            "tools:\n  - class_name: a.B\n    config: {x: " + "y" * 300 + "}\n",
            "is a tool YAML, not a recipe",
            "--tools",
        ),
        ("run: {steps: 1}\ntools: [{class_name: search}]\n", "tools is a list of tools", "tools: ./tools.yaml"),
        ("run: {steps: 1}\ntools: [{" + "k" * 300 + ": 1}, 5]\n", "tools: ", "agentloop config"),
    ],
)
def test_a_tool_yaml_in_place_of_a_recipe_is_called_one(tmp_path: Path, text: str, says: str, fix: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as found:
        load_config(Recipe, file)
    assert says in found.value.message and "255 bytes" not in found.value.message
    assert fix in str(found.value.hint)
