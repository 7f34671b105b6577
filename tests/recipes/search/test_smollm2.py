"""The generated facts for SmolLM2: what they ask can be read in a passage, and nobody is in two splits."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from agentloop.types import Task
from recipes.search.reward import compute_score
from recipes.search.smollm2 import data
from recipes.search.smollm2.facts import QUESTIONS, subjects


def test_each_answer_is_in_the_passage_and_no_name_is_another_ones() -> None:
    found = subjects()
    assert len({subject.name for subject in found}) == len(found) == 600
    for subject in found:
        assert subject.facts.keys() == QUESTIONS[subject.kind].keys()
        for answer in subject.facts.values():
            assert subject.text.count(answer) == 1, subject


def test_nobody_is_asked_for_in_two_splits() -> None:
    asked = {split: {row["prompt"][1]["content"] for row in data.rows(split)} for split in ("train", "val")}
    taught = {messages["messages"][1]["content"] for messages in data.sft_rows()}
    assert len(asked["train"]) > 1000 and len(asked["val"]) > 100
    names = [
        {s.name for s in subjects() if any(s.name in text for text in texts)} for texts in (*asked.values(), taught)
    ]
    assert not names[0] & names[1] and not names[1] & names[2] and not names[0] & names[2]


def test_the_warm_start_guesses_wrong_and_searches_right() -> None:
    truths = {QUESTIONS[s.kind][f].format(name=s.name): answer for s in subjects() for f, answer in s.facts.items()}
    searches = 0
    for row in data.sft_rows():
        messages = row["messages"]
        searched = len(messages) == 5
        searches += searched
        right = compute_score(messages[-1]["content"], [truths[messages[1]["content"]]])
        assert right == searched
        assert row["tools"][0]["function"]["name"] == "search"
    assert 0.4 < searches / data.SFT_ROWS < 0.6


def test_the_corpus_is_what_the_index_takes(tmp_path: Path) -> None:
    assert data.prepare(tmp_path) == {"corpus.jsonl": 600}
    lines = [orjson.loads(line) for line in (tmp_path / "corpus.jsonl").read_bytes().splitlines()]
    assert len({line["id"] for line in lines}) == 600
    title, _, text = lines[0]["contents"].partition("\n")
    assert title in text


@pytest.mark.parametrize("split", ["train", "val"])
def test_rows_have_the_form_of_the_recipes(split: str) -> None:
    row = next(data.rows(split))  # type: ignore[arg-type]
    task = Task(
        row["extra_info"]["split"], row["agent_name"], row["prompt"], ground_truth=row["reward_model"]["ground_truth"]
    )
    assert task.ground_truth["target"] and row["prompt"][0]["role"] == "system"
