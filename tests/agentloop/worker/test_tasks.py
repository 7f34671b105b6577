"""A row arrives in a worker exactly as it is here, or is refused by name."""

from __future__ import annotations

import datetime
import math
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from agentloop.config import AgentConfig, Recipe
from agentloop.errors import ConfigError, DataError
from agentloop.images import ImageFile, RowPath, read_image
from agentloop.types import Task
from agentloop.worker.tasks import decode_recipe, decode_task, encode_recipe, encode_task
from tests.agentloop.any_trajectory import JSON, TEXT, exact

PARTS = st.one_of(
    JSON,
    st.binary(max_size=8),
    st.datetimes(),
    st.datetimes(timezones=st.just(datetime.UTC)),
    st.dates(),
    st.times(),
    st.decimals(allow_nan=False),
    st.uuids(),
    st.sets(st.integers() | TEXT, max_size=3),
    st.frozensets(st.integers(), max_size=3),
    st.just(Path("a/b")),
)
VALUES = st.recursive(
    PARTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(TEXT | st.integers() | st.tuples(st.integers(), TEXT), inner, max_size=3)
    ),
    max_leaves=8,
)


def row(**columns: Any) -> Task:
    return Task(
        **{"task_id": "t1", "agent_name": "tool_agent", "prompt": [{"role": "user", "content": "?"}], **columns}
    )


def with_types(value: Any) -> Any:
    """`exact`, which also tells tuples from lists and 1 from True."""
    if isinstance(value, dict):
        return [(with_types(key), with_types(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return type(value), [with_types(item) for item in value]
    return type(value), exact(value)


@given(VALUES, VALUES, TEXT)
@settings(max_examples=200, deadline=None)
def test_any_row_arrives_as_it_is(truth: Any, extra: Any, text: str) -> None:
    made = row(ground_truth=truth, extra_info={"extra": extra}, prompt=[{"role": "user", "content": text}])
    arrived = decode_task(encode_task(made))
    assert with_types(arrived.ground_truth) == with_types(truth)
    assert with_types(arrived.extra_info["extra"]) == with_types(extra)
    assert arrived.prompt == made.prompt and arrived.task_id == "t1"


ARRAYS = [np.arange(6).reshape(2, 3), np.float32(0.1), np.zeros((0, 4), np.int8), np.array(["ab", "c"]), np.array(3.5)]


@pytest.mark.parametrize("array", ARRAYS)
def test_arrays_keep_shape_and_type(array: Any) -> None:
    arrived = decode_task(encode_task(row(ground_truth=array))).ground_truth
    assert arrived.dtype == array.dtype and np.shape(arrived) == np.shape(array)
    assert np.array_equal(arrived, array) and isinstance(arrived, np.generic) == isinstance(array, np.generic)


def test_an_image_in_two_places_stays_one(tmp_path: Path) -> None:
    path = RowPath("a.png", tmp_path)
    picture = {"bytes": b"file", "path": None}
    made = row(
        images=[path, picture],
        prompt=[{"role": "user", "content": [{"type": "image", "image": path}, {"type": "image", "image": picture}]}],
    )
    arrived = decode_task(encode_task(made))
    content: Any = arrived.prompt[0]["content"]
    assert content[0]["image"] is arrived.images[0] and content[1]["image"] is arrived.images[1]
    first = arrived.images[0]
    assert isinstance(first, RowPath) and (first, first.given, first.folder) == (path, "a.png", tmp_path)
    assert arrived.images[1] == picture


def test_a_pillow_image_becomes_what_an_episode_would_make_of_it() -> None:
    picture = Image.new("RGB", (4, 3), (200, 10, 30))
    (arrived,) = decode_task(encode_task(row(images=[picture]))).images
    assert isinstance(arrived, ImageFile) and arrived == read_image(picture)


class Own:
    """A type of a user."""


@pytest.mark.parametrize("place", ["ground_truth", "extra_info"])
def test_a_value_that_cannot_be_sent_is_refused_with_its_place(place: str) -> None:
    with pytest.raises(DataError, match=rf"row t1: {place} holds a value of type .*\.Own.*agent worker"):
        encode_task(row(**{place: {"deep": [Own()]}}))
    with pytest.raises(DataError, match=r"data\.train: a\.jsonl, row 3: ground_truth holds") as refused:
        encode_task(row(ground_truth=Own()), "data.train: a.jsonl, row 3")
    assert "cluster.agents.workers=0" in str(refused.value.hint)


def test_numbers_and_names_of_the_standard_library() -> None:
    values = [
        Decimal("1.10"),
        uuid.UUID(int=5),
        datetime.date(2026, 1, 2),
        2**100,
        -(2**70),
        "\ud800",
        (1, (2,)),
        True,
        1,
    ]
    assert with_types(decode_task(encode_task(row(ground_truth=values))).ground_truth) == with_types(values)


def test_a_row_that_is_too_long_or_within_itself_is_refused() -> None:
    with pytest.raises(DataError, match=r"row t1 has .* bytes; at most 100 can be sent"):
        encode_task(row(ground_truth="x" * 101), longest=100)
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(DataError, match="row t1: ground_truth holds a value within itself"):
        encode_task(row(ground_truth=circle))


def test_options_of_a_recipe_keep_their_types() -> None:
    options = {"weights": {1: 0.5}, "most": math.inf, "since": datetime.date(2026, 1, 2), "raw": b"\xff", "some": {"a"}}
    agent = {"class": "own.py:Own", "options": options}
    made = Recipe.model_validate(
        {"run": {"steps": 1}, "model": {"path": "/model"}, "data": {"train": "rows.jsonl"}, "agents": {"own": agent}}
        | {"reward": {"function": "gsm8k"}}
    )
    arrived = decode_recipe(encode_recipe(made), "/folder")
    assert arrived.model_dump() == made.model_dump() and arrived.folder == Path("/folder")
    assert with_types(arrived.agents["own"].options) == with_types(options)

    agent["options"] = {"own": Own()}
    with pytest.raises(ConfigError, match=r"\.Own, which cannot be sent"):
        encode_recipe(made.model_copy(update={"agents": {"own": AgentConfig.model_validate(agent)}}))
