"""Sampling has one schema; a request adds its own fields and the caller's changes."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from agentloop.config import SamplingConfig
from agentloop.wire import SamplingFields, SamplingParams


def test_the_recipe_has_exactly_the_shared_fields() -> None:
    assert list(SamplingConfig.model_fields) == list(SamplingFields.model_fields)
    for name, field in SamplingConfig.model_fields.items():
        if name != "max_new_tokens":  # a request may ask for 0, a turn may not
            assert field.metadata == SamplingParams.model_fields[name].metadata, name
            assert field.description == SamplingParams.model_fields[name].description, name
    assert (SamplingConfig().max_new_tokens, SamplingParams().max_new_tokens) == (64, 128)


@pytest.mark.parametrize(
    "wrong", [{"top_p": 0.0}, {"max_new_tokens": -1}, {"temprature": 1.0}, {"min_p": float("nan")}]
)
def test_both_refuse_the_same(wrong: dict[str, float]) -> None:
    for model in (SamplingConfig, SamplingParams):
        with pytest.raises(ValidationError):
            model(**wrong)


def test_a_minimum_beyond_the_maximum_is_refused() -> None:
    for model in (SamplingConfig, SamplingParams):
        with pytest.raises(ValidationError, match="9 is more than max_new_tokens 8"):
            model(max_new_tokens=8, min_new_tokens=9)


def test_changes_win_over_the_recipe_and_limits_are_cut_to_the_room() -> None:
    base = SamplingConfig(temperature=0.5, max_new_tokens=50, min_new_tokens=20)
    merged = SamplingParams.merged(base, {"top_k": 3, "temperature": 0.7, "sampling_seed": 4}, room=30)
    assert merged == SamplingParams(temperature=0.7, top_k=3, max_new_tokens=30, min_new_tokens=20, sampling_seed=4)
    tight = SamplingParams.merged(base, {}, room=5)
    assert (tight.max_new_tokens, tight.min_new_tokens) == (5, 5)


def test_a_change_that_is_not_a_field_is_refused() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        SamplingParams.merged(SamplingConfig(), {"max_new_tokens": 0}, room=5)
    with pytest.raises(ValidationError, match="temprature"):
        SamplingParams.merged(SamplingConfig(), {"temprature": 1.0}, room=5)
