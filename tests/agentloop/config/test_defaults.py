"""A default never depends on the other keys of its section, and evaluation samples as the rollout does, greedily."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pydantic import BaseModel

from agentloop.config import EvalSamplingConfig, Recipe, SamplingConfig, SftRecipe
from agentloop.config.docs import describe
from agentloop.config.keys import section_of
from agentloop.config.server import ServerSettings

REQUIRED = {"run": {"steps": 1}, "model": {"path": "m"}, "data": {"train": "t"}}


def recipe(**sections: object) -> Recipe:
    return Recipe.model_validate({**REQUIRED, **sections})


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for info in model.model_fields.values():
        section, _ = section_of(info.annotation)
        if section is not None:
            yield from sections(section)


@pytest.mark.parametrize("root", [Recipe, SftRecipe, ServerSettings])
def test_a_section_has_the_same_defaults_whether_it_is_written_or_not(root: type[BaseModel]) -> None:
    for model in sections(root):
        for name, info in model.model_fields.items():
            value = None if info.is_required() else info.get_default(call_default_factory=True)
            if isinstance(value, BaseModel):
                assert value == type(value)(), f"{model.__name__}.{name} differs from an empty section"
                assert value.__class__ is section_of(info.annotation)[0]


@pytest.mark.parametrize("named", [{"max_new_tokens": 7}, {"top_p": 0.5}, {"min_p": 0.1}, {}])
def test_evaluation_stays_greedy_whatever_else_is_set(named: dict[str, float]) -> None:
    assert recipe(eval={"sampling": named}).eval_sampling.temperature == 0.0


def test_evaluation_takes_each_field_of_the_rollout_that_it_does_not_name() -> None:
    rollout = {"max_new_tokens": 300, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "logit_bias": {3: -1.0}}
    found = recipe(rollout={"sampling": rollout}, eval={"sampling": {"top_k": 1, "logit_bias": {}}}).eval_sampling
    assert found == SamplingConfig(max_new_tokens=300, temperature=0.0, top_p=0.9, top_k=1, logit_bias={})
    assert (
        recipe(rollout={"sampling": rollout}, eval={"sampling": {"temperature": None}}).eval_sampling.temperature == 0.7
    )


def test_every_sampling_field_can_be_set_for_evaluation() -> None:
    assert set(EvalSamplingConfig.model_fields) == set(SamplingConfig.model_fields)


@pytest.mark.parametrize(
    ("rollout", "evaluation", "says"),
    [({}, {"top_p": 3}, "top_p"), ({"min_new_tokens": 50}, {"max_new_tokens": 5}, "min_new_tokens")],
)
def test_a_value_out_of_bounds_names_the_section(rollout: object, evaluation: object, says: str) -> None:
    with pytest.raises(ValueError, match=rf"eval\.sampling.*{says}"):
        recipe(rollout={"sampling": rollout}, eval={"sampling": evaluation})


def test_the_resolved_recipe_shows_what_is_sampled() -> None:
    shown = recipe(rollout={"sampling": {"max_new_tokens": 300}}).plain()["eval"]["sampling"]
    assert (shown["temperature"], shown["max_new_tokens"], shown["top_k"]) == (0.0, 300, -1)
    again = Recipe.model_validate(recipe(eval={"sampling": {"top_p": 0.5}}).plain())
    assert again.eval_sampling.top_p == 0.5


def test_the_reference_prints_what_is_true() -> None:
    lines = {line.split(" = ")[0]: line for line in describe(Recipe) if " = " in line}
    assert "= 0.0 " in lines["eval.sampling.temperature"]
    assert "null: as rollout.sampling" in lines["eval.sampling.max_new_tokens"]
    assert "= 1e-05 " in lines["trainer.critic.optim.lr"]
    assert "= (required unless reward is null) " in lines["reward.function"]
    assert "= (required) " in lines["data.train"] and "= (required) " in lines["loggers.<n>.name"]
    sections = [line for line in describe(Recipe) if line.startswith("# ")]
    for name in ("reward", "trainer.critic", "trainer.lora", "trace.otlp", "trace.weave"):
        assert any(line.startswith(f"# {name}: ") and " Null, the default: " in line for line in sections), name


def test_the_critics_rate_does_not_depend_on_its_other_keys() -> None:
    trainer = {"algorithm": {"advantage": "gae"}, "critic": {"optim": {"weight_decay": 0.1}}}
    critic = recipe(trainer=trainer).trainer.critic
    assert critic is not None and critic.optim.lr == 1e-5
