"""The reward of search: a table of texts and scores, and time that grows with the text only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from agentloop.types import Task, Trajectory
from recipes.search import reward
from recipes.search.reward import (
    Method,
    compute_score,
    extract_answer,
    normalize,
    score,
    score_f1,
    score_subem,
    targets_of,
)

BEIJING = ["Beijing"]

TABLE: list[tuple[str, Any, Method, float]] = [
    # exact match, and what the normalization folds
    ("<answer>Beijing</answer>", BEIJING, "em", 1),
    ("<answer> Beijing </answer>", BEIJING, "em", 1),
    ("<answer>\nBeijing\n</answer>", BEIJING, "em", 1),
    ("<answer>beijing</answer>", BEIJING, "em", 1),
    ("<answer>BEIJING.</answer>", BEIJING, "em", 1),
    ("<answer>Bei-jing!</answer>", BEIJING, "em", 1),
    ("<answer>the Beijing</answer>", BEIJING, "em", 1),
    ("<answer>a  Beijing   an</answer>", BEIJING, "em", 1),
    ("<answer>Beijing, China</answer>", BEIJING, "em", 0),
    ("<answer>Bei jing</answer>", BEIJING, "em", 0),
    ("<answer>Peking</answer>", BEIJING, "em", 0),
    ("<answer></answer>", BEIJING, "em", 0),
    ("<answer>   </answer>", BEIJING, "em", 0),
    ("<answer>.</answer>", BEIJING, "em", 0),
    ("<answer>the</answer>", BEIJING, "em", 0),
    ("<answer>theBeijing</answer>", BEIJING, "em", 0),
    # any target
    ("<answer>Peking</answer>", ["Beijing", "Peking"], "em", 1),
    ("<answer>Peking</answer>", ["Beijing", "The Peking"], "em", 1),
    ("<answer>Beijing Peking</answer>", ["Beijing", "Peking"], "em", 0),
    ("<answer>14 December 1972</answer>", ["14 December 1972 UTC", "December 1972"], "em", 0),
    ("<answer>December, 1972</answer>", ["14 December 1972 UTC", "December 1972"], "em", 1),
    ("<answer>1,000</answer>", ["1000"], "em", 1),
    ("<answer>1.5</answer>", ["15"], "em", 1),  # punctuation goes, as in the original
    ("<answer>$5</answer>", ["5"], "em", 1),
    ("<answer>C++</answer>", ["C"], "em", 1),
    ("<answer>7</answer>", [7], "em", 1),
    ("<answer>7</answer>", 7, "em", 1),
    ("<answer>Beijing</answer>", "Beijing", "em", 1),
    ("<answer>Beijing</answer>", {"target": "Beijing"}, "em", 1),
    ("<answer>Beijing</answer>", {"target": ["x", "Beijing"]}, "em", 1),
    ("<answer>Beijing</answer>", {"target": np.array(["x", "Beijing"], object)}, "em", 1),
    ("<answer>Zürich</answer>", ["zürich"], "em", 1),
    ("<answer>Zurich</answer>", ["Zürich"], "em", 0),
    ("<answer>北京</answer>", ["北京"], "em", 1),
    ("<answer>İ</answer>", ["i̇"], "em", 1),
    # a name of articles alone
    ("<answer>The The</answer>", ["The The"], "em", 1),
    ("<answer>the</answer>", ["The The"], "em", 0),
    ("<answer></answer>", ["A"], "em", 0),
    ("<answer>A</answer>", ["a"], "em", 1),
    ("<answer>!!!</answer>", ["!!!"], "em", 1),
    # which tags count
    ("Beijing", BEIJING, "em", 0),
    ("", BEIJING, "em", 0),
    ("<answer>Beijing", BEIJING, "em", 0),
    ("Beijing</answer>", BEIJING, "em", 0),
    ("</answer>Beijing<answer>", BEIJING, "em", 0),
    ("<Answer>Beijing</Answer>", BEIJING, "em", 0),
    ("< answer>Beijing</answer>", BEIJING, "em", 0),
    ("<think>x</think><answer>Beijing</answer> so it is", BEIJING, "em", 1),
    ("<answer>Rome</answer><answer>Beijing</answer>", BEIJING, "em", 1),
    ("<answer>Beijing</answer><answer>Rome</answer>", BEIJING, "em", 0),
    ("<answer>Beijing</answer><answer>Rome", BEIJING, "em", 1),
    ("<answer>Rome<answer>Beijing</answer>", BEIJING, "em", 0),
    ("<answer>Beijing</answer></answer>", BEIJING, "em", 1),
    ("<answer><answer>Beijing</answer></answer>", BEIJING, "em", 0),
    # many tags
    ("<answer>Beijing</answer>" * 10, BEIJING, "em", 1),
    ("<answer>Beijing</answer>" * 11, BEIJING, "em", 0.25),
    ("</answer>" * 10 + "<answer>Beijing</answer>", BEIJING, "em", 0.25),
    ("<answer>" * 9 + "</answer><answer>Beijing</answer>", BEIJING, "em", 1),
    ("<answer>" * 10 + "</answer><answer>Beijing</answer>", BEIJING, "em", 0.25),
    ("<answer>Rome</answer>" * 11, BEIJING, "em", 0),
    # sub-EM
    ("<answer>It is Beijing, China</answer>", BEIJING, "subem", 1),
    ("<answer>Rome</answer>", BEIJING, "subem", 0),
    ("<answer>Bei</answer>", BEIJING, "subem", 0),
    ("<answer>anything</answer>", ["the"], "subem", 0),
    ("<answer>The</answer>", ["the"], "subem", 1),
    ("<answer>Beijing or Rome</answer>" * 11, BEIJING, "subem", 0.25),
    ("Beijing", BEIJING, "subem", 0),
    # F1
    ("<answer>Beijing</answer>", BEIJING, "f1", 1),
    ("<answer>Beijing China</answer>", BEIJING, "f1", 2 / 3),
    ("<answer>one two three</answer>", ["two three four"], "f1", 2 / 3),
    ("<answer>two two</answer>", ["two"], "f1", 2 / 3),
    ("<answer>Rome</answer>", BEIJING, "f1", 0),
    ("<answer></answer>", BEIJING, "f1", 0),
    ("<answer>one two</answer>", ["x", "one", "one two three"], "f1", 0.8),
    ("<answer>The The</answer>", ["the the"], "f1", 1),
    ("<answer>Beijing China</answer>" * 11, BEIJING, "f1", 1 / 6),
]


@pytest.mark.parametrize(("text", "truth", "method", "expected"), TABLE)
def test_the_table(text: str, truth: Any, method: Method, expected: float) -> None:
    assert compute_score(text, truth, method=method) == pytest.approx(expected)


def test_the_table_is_long() -> None:
    assert len(TABLE) >= 60


def test_a_format_score_is_for_wrong_answers_only() -> None:
    assert compute_score("<answer>Rome</answer>", BEIJING, format_score=0.1) == 0.1
    assert compute_score("Rome", BEIJING, format_score=0.1) == 0
    assert compute_score("<answer>Beijing</answer>", BEIJING, format_score=0.1) == 1


@pytest.mark.parametrize("truth", [None, {}, {"target": None}, {"target": []}, [], "", [None], {"target": [""]}])
def test_a_row_without_an_answer_is_an_error_and_not_a_zero(truth: Any) -> None:
    with pytest.raises(ValueError, match="no ground truth"):
        compute_score("<answer>x</answer>", truth)


def test_targets_and_normalization() -> None:
    assert targets_of({"target": ["a", None, " ", 3]}) == ["a", "3"]
    assert normalize(" The  Eiffel-Tower, a ") == "eiffeltower"
    assert extract_answer("<answer> a </answer> <answer>b</answer>") == "b"


@pytest.mark.parametrize("method", ["em", "subem", "f1"])
@pytest.mark.parametrize(
    "piece",
    ["<answer>", "</answer>", "<answer></answer>", "a ", "the ", "<", "<answer", ". ", "\n", "the", "é", "<answer>x"],
)
def test_long_texts_take_linear_time(method: Method, piece: str) -> None:
    """A hundred thousand characters and more: a quadratic step would take minutes."""
    for size in (100_000, 400_000) if method == "em" else (100_000,):
        text = (piece * size)[:size]
        for wrapped in (text, f"<answer>{text}</answer>"):
            assert 0 <= compute_score(wrapped, ["x y", "the a " * 100], method=method) <= 1


@pytest.mark.parametrize("method", ["em", "subem", "f1"])
def test_an_answer_is_normalized_once_for_all_targets(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def counting(text: str) -> str:
        seen.append(text)
        return normalize(text)

    monkeypatch.setattr(reward, "normalize", counting)
    answer = "the " * 10_000 + "end"
    assert compute_score(f"<answer>{answer}</answer>", [f"name {n}" for n in range(100)], method=method) == 0
    assert seen.count(answer) == 1


def test_the_recipes_functions() -> None:
    task = Task("0", "a", [], ground_truth={"target": ["Beijing"]})
    trajectory = Trajectory([], [], [], [], 0)
    text = "<answer>Beijing China</answer>"
    assert score(task, text, trajectory) == {"score": 0.0, "answer": "Beijing China"}
    assert score_subem(task, text, trajectory)["score"] == 1.0
    assert score_f1(task, text, trajectory)["score"] == pytest.approx(2 / 3)
