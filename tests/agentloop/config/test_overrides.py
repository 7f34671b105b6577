"""Overrides mean what they say: text stays text, lists extend, sections switch on, secrets are not shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agentloop.config import Recipe, SftRecipe
from agentloop.config.loading import load_config
from agentloop.errors import ConfigError

MINIMAL = "run: {name: t, steps: 1}\nmodel: {path: ./model}\ndata: {train: ./rows.jsonl}\n"
SFT = "model: {path: ./model}\nstages: [{name: a, data: ./rows.jsonl, steps: 1}]\n"


WRONG = [
    (["run.steps=two"], "override 'run.steps=two' has an error:\n  - run.steps: "),
    (["seed=1", "run.name=my vision"], "override 'run.name=my vision' has an error:"),
    (["trainer.algorithm.advantage=grop"], "did you mean 'grpo'?"),
    (["trainer.algorithm={advantage: grop}"], "override 'trainer.algorithm={advantage: grop}' has an error:"),
    (["rollout.token=[1]"], "override 'rollout.token=(hidden)' has an error:"),
    (["run.steps=two", "run.name=a b"], "overrides have 2 errors:\n  - run.name: "),
    (["run.steps=two", "run.name=a b"], ", in override 'run.steps=two'"),
    (["run.steps=null"], "recipe.yaml with its overrides has an error:\n  - run: set run.steps or run.epochs"),
    (["trace.otlp.timeout_s=3"], "recipe.yaml with its overrides has an error:\n  - key 'trace.otlp.endpoint'"),
    (["run.steps=${x}"], "override 'run.steps=${x}': run.steps: Interpolation key"),
    (["run.name=a\0b"], "': run.name has a NUL character"),
    (["seed=99999999999999999999"], "override 'seed=99999999999999999999': seed is an integer of more than 64 bits"),
]
"""Overrides with a wrong value, and what the message has."""


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def load(*overrides: str, text: str = MINIMAL, model: Any = Recipe) -> Any:
        file = tmp_path / "recipe.yaml"
        file.write_text(text)
        return load_config(model, file, overrides)

    return load


@pytest.mark.parametrize("name", ["123", "007", "no", "true", "1e3", "2026-01-01", "1_000", "0x10", "12:30:00"])
def test_text_is_taken_as_it_is_written(load: Any, name: str) -> None:
    if ":" not in name:
        assert load(f"run.name={name}").run.name == name
        assert load(f"run={{name: {name}, steps: 2}}").run.name == name
        assert load(text=MINIMAL.replace("name: t", f"name: {name}")).run.name == name
        assert load(text=f"base: &b {{name: {name}}}\n" + MINIMAL.replace("name: t", "<<: *b"), model=_WithBase) == name
    assert load(f"rollout.token={name}").rollout.token == name
    assert load(f"data.train=[a.jsonl, {name}]").data.train[1] == name
    assert load(f"rollout.engine_args=[{name}]").rollout.engine_args == [name]
    assert load(f"model.tool_format={name}").model.tool_format == name


class _WithBase(Recipe):
    base: Any = None

    def __eq__(self, other: object) -> bool:
        return self.run.name == other

    __hash__ = None  # type: ignore[assignment]


def test_null_and_quotes_mean_what_they_mean_in_yaml(load: Any) -> None:
    assert load("rollout.token=null").rollout.token is None
    assert load("rollout.token='null'").rollout.token == "null"
    assert load('run.name="5"').run.name == "5"
    assert load("run.steps=null", "run.epochs=2").run.epochs == 2


def test_choices_that_yaml_reads_as_booleans_stay_choices(load: Any) -> None:
    assert load("trainer.algorithm.correction.importance=none").trainer.algorithm.correction.importance == "none"
    assert load("rollout.deterministic=true").rollout.deterministic is True


def test_an_entry_of_a_list_is_set_by_its_number(load: Any) -> None:
    first = load("loggers.0.name=tensorboard")
    assert [logger.name for logger in first.loggers] == ["tensorboard"]
    both = load("loggers.1.name=wandb", "loggers.1.options.project=x", text=MINIMAL + "loggers: [tensorboard]\n")
    assert [logger.name for logger in both.loggers] == ["tensorboard", "wandb"]
    assert both.loggers[1].options == {"project": "x"}
    changed = load("loggers.0.options.project=y", text=MINIMAL + "loggers: [{wandb: {project: x, entity: e}}]\n")
    assert changed.loggers[0].options == {"project": "y", "entity": "e"}
    with pytest.raises(ConfigError, match=r"loggers is a list of 0\n.*the next entry is loggers\.0"):
        load("loggers.1.name=wandb")
    assert load("stages.0.optim.lr=0.5", text=SFT, model=SftRecipe).stages[0].optim.lr == 0.5


@pytest.mark.parametrize("value", ["tensorboard", "[tensorboard]", "[{tensorboard: {}}]", "{tensorboard: {}}"])
def test_loggers_take_a_single_one(load: Any, value: str) -> None:
    assert [logger.name for logger in load(f"loggers={value}").loggers] == ["tensorboard"]
    assert [logger.name for logger in load(text=MINIMAL + f"loggers: {value}\n").loggers] == ["tensorboard"]


def test_an_optional_section_is_switched_on_and_off(load: Any) -> None:
    assert load("trainer.lora=true").trainer.lora.rank == 16
    assert load("trainer.lora=true", "trainer.lora.rank=8").trainer.lora.rank == 8
    assert load("trainer.lora=false", text=MINIMAL + "trainer: {lora: {rank: 4}}\n").trainer.lora is None
    assert load("lora=true", text=SFT, model=SftRecipe).lora.rank == 16
    on = load("trainer.critic=true", "trainer.algorithm.advantage=gae")
    assert on.trainer.critic.optim.lr == 1e-5


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trainer.lora.r=8", "trainer.lora.rank"),
        ("trainer.optim.learning_rate=1", "trainer.optim.lr"),
        ("agents.mine.max_turn=1", "agents.mine.max_"),
        ("loggers.0.nme=x", "loggers.0.name"),
        ("rollout.sampling.max_tokens=5", "rollout.sampling.max_new_tokens"),
    ],
)
def test_the_hint_names_the_key_of_the_same_section(load: Any, override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(override)
    assert f"did you mean '{says}" in str(caught.value)


def test_an_override_of_an_interpolated_section_changes_a_copy(load: Any) -> None:
    text = MINIMAL + "rollout: {sampling: {top_p: 0.5}}\neval: {sampling: '${rollout.sampling}'}\n"
    recipe = load("eval.sampling.temperature=0.3", text=text)
    assert (recipe.eval_sampling.top_p, recipe.eval_sampling.temperature) == (0.5, 0.3)
    assert recipe.rollout.sampling.temperature == 1.0


@pytest.mark.parametrize(
    "override",
    [
        "rollout.token=[SECRET1]", "rollout.tokn=SECRET1", "rollout.token={a: SECRET1", "rollout={token: [SECRET1]}",
        "rollout.token.x=SECRET1", "rollout.token=${SECRET1",
        "loggers=[{wandb: {api_key: SECRET1}}, 7]", "loggers.0.options={api_key: SECRET1",
        "rollout.admin_token='SECRET1",
    ],
)  # fmt: skip
def test_no_error_shows_a_secret(load: Any, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(override)
    assert "SECRET1" not in str(caught.value)


def test_no_error_shows_a_secret_of_the_file(load: Any) -> None:
    for line in ("rollout: {token: [SECRET1]}\n", "rollout: {token: 'SECRET1\n", "rollout: {token: {a: SECRET1}}\n"):
        with pytest.raises(ConfigError) as caught:
            load(text=MINIMAL + line)
        assert "SECRET1" not in str(caught.value)


def test_plain_data_hide_secrets_everywhere(load: Any) -> None:
    recipe = load(
        "rollout.token=SECRET1",
        "loggers=[{wandb: {api_key: SECRET1, project: p}}]",
        "rollout.engine_args=[--api-key, SECRET1, --token=SECRET1, --port=3]",
        "rollout.url=http://user:SECRET1@host:1",
        "data.options={hub: {token: SECRET1}}",
    )
    text = json.dumps(recipe.plain())
    assert "SECRET1" not in text
    assert '"project": "p"' in text and "--port=3" in text and "http://(hidden)@host:1" in text


@pytest.mark.parametrize("name", ["..", ".", "...", "a/b", "a\nb", "a\0b", "\x1b[31m", "", "x" * 300, "-\u202e"])
def test_a_run_cannot_be_named_out_of_its_folder(load: Any, name: str) -> None:
    for model, text in ((Recipe, MINIMAL), (SftRecipe, SFT)):
        with pytest.raises(ConfigError):
            load(f"run.name={json.dumps(name)}", text=text, model=model)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("run.steps=99999999999999999999", "more than 64 bits"),
        ("run.steps=1e400", "run.steps"),
        ("trainer.ranks=1000000", "4096"),
        ("reward_timeout_s=1e300", "100000000"),
        ("rollout.device=banana", "cpu, cuda"),
        ('data.train="a\\0b"', "NUL"),
        ("data.options={a: 99999999999999999999}", "data.options.a is an integer of more than 64 bits"),
        ("trainer=5", "section of keys"),
        ("run.steps=" + "[" * 5000, "deep"),
        ("data.options=" + "{a: " * 70 + "1" + "}" * 70, "nested more than 64"),
    ],
)
def test_absurd_values_are_refused_by_name(load: Any, override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(override)
    assert says in str(caught.value)


BOMB = "b0: &b0 [x, y]\n" + "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 10)}]\n" for i in range(1, 7))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "aliases"),
        ("a: &a\n  b: *a\n", "nested more than"),
        ("x: " + "[" * 3000 + "]" * 3000, "deep"),
        ("#" * (2**20 + 1), "more than 1 MB"),
        ("run: \x00\n", "not valid YAML"),
        ("run: {a: 1, a: 2}\n", "duplicate"),
        ("? [1, 2]\n: 3\n", "line 1"),
        ("a: !!python/object/apply:os.system [ls]\n", "YAML"),
        ("a: 1\n---\nb: 2\n", "YAML"),
        ("", "not a mapping"),
    ],
)  # fmt: skip
def test_hostile_yaml_is_refused_by_name(load: Any, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text=text)
    assert says in str(caught.value)


def test_a_mark_at_the_start_of_the_file_is_no_part_of_the_first_key(load: Any) -> None:
    assert load(text="\ufeff" + MINIMAL).run.name == "t"


def test_a_recipe_of_the_other_kind_says_so(load: Any) -> None:
    with pytest.raises(ConfigError, match="recipe of `agentloop sft`"):
        load(text=SFT)
    with pytest.raises(ConfigError, match="recipe of `agentloop train`"):
        load(text=MINIMAL, model=SftRecipe)


@pytest.mark.parametrize(("overrides", "says"), WRONG)
def test_a_wrong_value_of_an_override_is_not_blamed_on_the_file(load: Any, overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    assert says in str(caught.value)
    assert ("recipe.yaml" in str(caught.value)) == ("recipe.yaml" in says)


def test_wrong_values_of_the_file_and_of_an_override_are_told_apart(load: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        load("run.steps=two", text=MINIMAL + "seed: x\n")
    head, first, second, _ = str(caught.value).splitlines()
    assert head.endswith("recipe.yaml with its overrides has 2 errors:")
    assert first.startswith("  - seed: ") and "override" not in first
    assert second.startswith("  - run.steps: ") and second.endswith(", in override 'run.steps=two'")

    with pytest.raises(ConfigError, match=r"recipe.yaml has an error:\n  - seed"):
        load("run.steps=2", text=MINIMAL + "seed: x\n")


@pytest.mark.parametrize(
    ("override", "text", "model", "command"),
    [
        ("seed=x", MINIMAL, Recipe, "agentloop config"),
        ("seed=x", SFT, SftRecipe, "agentloop config --sft"),
        ("nothing_like_it_at_all=3", SFT, SftRecipe, "agentloop config --sft"),
        ("stages.1.steps=3", SFT, SftRecipe, "agentloop config --sft"),
    ],
)
def test_the_command_that_prints_the_keys_is_that_of_the_recipes_kind(
    load: Any, override: str, text: str, model: Any, command: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(override, text=text, model=model)
    assert str(caught.value).endswith(f"fix: `{command}` prints every key with its meaning and default")
