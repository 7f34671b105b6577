"""Generated problems: gsm8k's form, splits that share nothing, and a warm start that leaves the skill to RL."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from tokenizers import Tokenizer

from recipes.gsm8k.data import make_row
from recipes.gsm8k.problems import (
    NAMES,
    OPERATIONS,
    THINGS,
    WARM_START_ROWS,
    attempt,
    drills,
    prepare,
    problem,
    problems,
    train_rows,
    val_rows,
    warm_start,
)
from recipes.gsm8k.reward import compute_score
from recipes.gsm8k.twin.tokenizer import write_model_folder


def test_a_problem_has_gsm8ks_columns_and_its_solution_is_right() -> None:
    for found in problems("train", 50):
        row = make_row(found.row, "train", 0)
        a, sign, b, value = re.findall(r"<<(\d+)([-+*])(\d+)=(\d+)>>", found.row["answer"])[0]
        assert OPERATIONS[sign](int(a), int(b)) == int(value) == found.answer
        assert {a, b} == set(re.findall(r"\d+", found.question))
        assert compute_score(found.solution, row["reward_model"]["ground_truth"]) == 1.0


def test_no_question_is_in_two_splits_and_a_seed_gives_the_same_rows() -> None:
    train, test = ([row["extra_info"]["question"] for row in rows()] for rows in (train_rows, val_rows))
    warm = {row["messages"][1]["content"] for row in warm_start(2000, 0) if "messages" in row}
    assert len(set(train)) == 2048 and len(set(test)) == 256
    assert not set(train) & set(test) and not warm & set(train) and not warm & set(test)
    assert train == [row["extra_info"]["question"] for row in train_rows()]
    assert [p.question for p in problems("test", 9, seed=1)] != test[:9]


def test_an_attempt_of_the_warm_start_is_right_in_one_of_four_cases_whatever_the_story() -> None:
    rng = random.Random(0)
    for sign in OPERATIONS:
        stories = [found for _ in range(6000) if (found := problem(rng, "sft")).operation == sign]
        right = sum(attempt(rng, story)[1] == story.answer for story in stories) / len(stories)
        assert 0.22 < right < 0.30


def test_the_twins_tokenizer_is_built_again_the_same_and_reads_words(repo: Path, tmp_path: Path) -> None:
    model = repo / "recipes/gsm8k/twin/model"
    write_model_folder(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (model / name).read_bytes(), name
    made, saved = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, model))
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings", "eos_token_id", "pad_token_id")
    assert {key: saved[key] for key in same} == {key: made[key] for key in same}
    assert (model / "model.safetensors").stat().st_size < 3_000_000

    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    words = [tokenizer.encode(f" {word}").tokens for word in (*NAMES, *THINGS)]
    assert all(len(tokens) == 1 for tokens in words)
    assert len(tokenizer.encode("12").tokens) == 2


def test_the_warm_start_answers_checks_truthfully() -> None:
    for row in warm_start(500, 0):
        for call, result in zip(row.get("messages", []), row.get("messages", [])[1:], strict=False):
            if result["role"] == "tool":
                answer = call["tool_calls"][0]["function"]["arguments"]["answer"]
                assert re.fullmatch(rf"Current parsed answer: {answer}, reward: [01]", result["content"])


def test_prepare_writes_what_the_stages_read(tmp_path: Path) -> None:
    assert prepare(tmp_path / "data") == {"drill.jsonl": 150, "answers.jsonl": WARM_START_ROWS}
    rows = [json.loads(line) for line in (tmp_path / "data" / "drill.jsonl").read_text().splitlines()]
    assert rows == list(drills())
    for row in rows:
        left, right = row["text"][: row["loss_from"]], row["text"][row["loss_from"] :]
        a, sign, b, _ = left.split()
        assert left.endswith("=") and int(right) == OPERATIONS[sign](int(a), int(b))
