"""The twin of search: what its knowledge base holds, whom its questions are about, and what its model has learned."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from agentloop.config import SftModel
from recipes.search.reward import compute_score
from recipes.search.twin import data
from recipes.search.twin.tokenizer import write_model_folder
from tools.search.index.bm25 import Bm25Builder
from tools.search.index.building import build_index
from tools.search.index.folder import open_folder
from tools.search.text import show_passages
from trainer.sft.tokenizing import SftTokenizer


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """The text of each passage, by title."""
    found = dict(row["contents"].split("\n") for row in data.passages())
    return {title.strip('"'): text for title, text in found.items()}


@pytest.fixture(scope="module")
def questions() -> list[dict[str, Any]]:
    return data.train_rows() + data.val_rows()


def asked(row: dict[str, Any]) -> str:
    """The name in a question."""
    return str(row["prompt"][1]["content"].split('"')[1])


def test_ten_thousand_passages_each_about_one_name(texts: dict[str, str]) -> None:
    assert len(data.passages()) == len(texts) == 10_000
    assert set(texts) == {*data.PEOPLE, *data.TOWNS}
    assert data.passages() == data.passages() and data.train_rows() == data.train_rows()
    words = (*data.FIRST, *data.LAST, *data.NEAR, *data.PLACES, *data.RIVERS, *data.TRADES, *data.WARES)
    assert len(words) == len(set(words)) == 100 + 80 + 20 + 100 + 50 + 30 + 30


def test_half_of_the_questions_take_two_searches(questions: list[dict[str, Any]]) -> None:
    for split in ("train", "test"):
        rows = [row for row in questions if row["extra_info"]["split"] == split]
        harder = sum(len(row["extra_info"]["queries"]) == 2 for row in rows)
        assert harder == len(rows) / 2
        assert len({asked(row) for row in rows}) == len(rows)


def test_nobody_and_no_town_of_the_evaluation_is_asked_about_in_a_training(questions: list[dict[str, Any]]) -> None:
    names: dict[str, set[str]] = {"train": set(), "test": set()}
    for row in questions:
        names[row["extra_info"]["split"]] |= {asked(row), *row["extra_info"]["queries"]}
    assert len(names["test"]) > 300 and not names["train"] & names["test"]

    known = data.world()
    towns = {split: {known.people[name].town for name in known.asked[split]} for split in known.asked}
    assert not towns["train"] & towns["test"]
    warm = {row["messages"][1]["content"].split('"')[1] for row in data.conversations(3000)}
    assert len(warm) > 2000 and warm <= set(data.world().asked["train"])


def test_the_answer_is_in_the_last_passage_and_only_there(
    questions: list[dict[str, Any]], texts: dict[str, str]
) -> None:
    for row in questions:
        queries, (answer,) = row["extra_info"]["queries"], row["reward_model"]["ground_truth"]["target"]
        assert f'"{answer}"' in texts[queries[-1]] and queries[0] == asked(row)
        assert answer not in row["prompt"][1]["content"]
        if len(queries) == 2:
            assert f'"{queries[1]}"' in texts[queries[0]] and answer not in texts[queries[0]]
        assert compute_score(f"<answer>{answer}</answer>", row["reward_model"]["ground_truth"]) == 1.0

        # Each passage has two facts: which of them is asked for has to be read.
        assert texts[queries[-1]].count('"') == 4


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_search_for_a_name_finds_its_passage(tmp_path: Path, questions: list[dict[str, Any]], shuffled: bool) -> None:
    data.prepare(tmp_path)
    corpus = tmp_path / ("shuffled.jsonl" if shuffled else "corpus.jsonl")
    build_index(corpus, tmp_path / "index", Bm25Builder(), progress=lambda *_: None)
    opened = open_folder(tmp_path / "index")
    queries = sorted({query for row in questions for query in row["extra_info"]["queries"]})
    for query, hits in zip(queries, opened.index.search(queries, 1), strict=True):
        contents = opened.corpus.document(hits.numbers[0])["contents"]
        assert shuffled or contents.startswith(f'"{query}"\n'), query


def test_the_controls_passages_have_the_texts_of_others(texts: dict[str, str]) -> None:
    rows = data.passages(shuffled=True)
    moved = {title.strip('"'): text for title, text in (row["contents"].split("\n") for row in rows)}
    assert set(moved) == set(texts) and Counter(moved.values()) == Counter(texts.values())
    assert sum(moved[title] == text for title, text in texts.items()) < 10  # two towns may be alike


def test_the_warm_start_shows_what_the_tool_returns(texts: dict[str, str]) -> None:
    results = [message for row in data.conversations(300) for message in row["messages"] if message["role"] == "tool"]
    for message in results:
        title, text = message["content"].split("\n")
        name = title.removeprefix('Doc 1 (Title: "').removesuffix('")')
        shown, _ = show_passages([name], [[f'"{name}"\n{text}']])
        assert shown == message["content"]
        assert text.split('"')[0::2] == texts[name].split('"')[0::2]  # the words around the names

    # Its facts are invented: they agree with the knowledge base as often as chance has it.
    right = sum(message["content"].endswith(f"\n{texts[message['content'].split(chr(34))[1]]}") for message in results)
    assert len(results) > 300 and right / len(results) < 0.01


PLACES = {
    "trade": r'works as a "(.+?)"',
    "town": r'lives in "(.+?)"',
    "river": r'river "(.+?)"',
    "ware": r'makes "(.+?)"',
}
"""Where a passage has a fact."""


def test_the_warm_start_is_right_in_one_of_three_cases() -> None:
    """The right search is one choice of several, and so are going on and the right fact."""
    forms = {question.text.split('"')[0]: question for question in data.WARM_START_QUESTIONS}
    right: Counter[int] = Counter()
    for row in data.conversations(4000):
        asked = row["messages"][1]["content"].split('"')
        question, name = forms[asked[0]], asked[1]
        passages = {
            message["content"].split('"')[1]: message["content"]
            for message in row["messages"]
            if message["role"] == "tool"
        }
        if question.searches == 2 and name in passages:
            name = re.findall(PLACES["town"], passages[name])[0]
        fact = re.findall(PLACES[question.fact], passages.get(name, ""))
        right[question.searches] += [row["messages"][-1]["content"]] == [data.answer(found) for found in fact]
    assert 0.33 < right[1] / 2000 < 0.44 and 0.2 < right[2] / 2000 < 0.3


def test_the_tokenizer_is_built_again_the_same_and_a_name_is_the_same_tokens_everywhere(
    repo: Path, tmp_path: Path
) -> None:
    model = repo / "recipes/search/twin/model"
    write_model_folder(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (model / name).read_bytes(), name
    made, saved = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, model))
    same = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "tie_word_embeddings",
        "eos_token_id",
    )
    assert {key: saved[key] for key in same} == {key: made[key] for key in same}
    assert sum(file.stat().st_size for file in model.iterdir()) < 5_000_000

    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rng = random.Random(0)
    for name in (*rng.sample(data.PEOPLE, 400), *rng.sample(data.TOWNS, 400), *data.RIVERS, *data.TRADES, *data.WARES):
        ids = tokenizer.encode(name).ids
        assert len(ids) == len(name.split()), name
        for form in ('Where does "%s" live?', 'lives in "%s".', '{"query_list": ["%s"]}', data.answer("%s")):
            found = tokenizer.encode(form % name).ids
            assert any(found[i : i + len(ids)] == ids for i in range(len(found))), form


def test_the_model_copies_names_and_does_not_yet_know_which(repo: Path) -> None:
    """What reinforcement learning starts from."""
    from transformers import Qwen2ForCausalLM

    folder = repo / "recipes/search/twin/model"
    lm = Qwen2ForCausalLM.from_pretrained(folder).eval()
    assert sum(tensor.numel() for tensor in lm.parameters()) <= 1_000_000
    tokenizer = SftTokenizer.load(SftModel(path=str(folder)), 1024)

    def likelihood(messages: list[dict[str, Any]]) -> float:
        """Return the probability of the last turn, given what is before it."""
        found = tokenizer.row({"messages": messages, "tools": data.tool_schemas()}, "row")
        assert found is not None
        ids = torch.from_numpy(found.token_ids).long()[None]
        with torch.no_grad():
            logits = lm(input_ids=ids).logits[0, :-1]
        chances = logits.softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        trained = torch.from_numpy(found.loss_mask)[1:]
        last = int(torch.nonzero(~trained)[-1]) + 1
        return float(chances[last:].prod())

    searched, answered = [], []
    for row in data.rows("test", 40):
        name = row["extra_info"]["queries"][0]
        person = data.world().people[name]
        messages = [*row["prompt"], data.call(name)]
        searched.append(likelihood(messages))
        messages.append({"role": "tool", "content": f'Doc 1 (Title: "{name}")\n{person.text}'})
        turns = [{"role": "assistant", "content": data.answer(fact)} for fact in vars(person).values()]
        answered.append([likelihood([*messages, turn]) for turn in turns])
    assert 0.5 < sum(searched) / len(searched) < 0.95
    trade, town = (sum(found) / len(found) for found in zip(*answered, strict=True))
    assert 0.1 < trade < 0.45 and 0.1 < town < 0.45 and trade + town > 0.35
