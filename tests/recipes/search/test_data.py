"""Rows of search: the established columns, files and prompts of others, wrong input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agentloop.commands.prepare import prepare_rows
from agentloop.errors import ConfigError, DataError
from recipes.search import data
from recipes.search.data import Question, make_row, prepare, read_prompt
from recipes.search.questions import passages, questions

PROMPT = Path(data.__file__).with_name("prompt.yaml")


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


def rows_of(file: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(file).to_pylist())


def test_a_row_has_the_established_columns() -> None:
    row = make_row(Question("who wrote it", ["A B", "B"], "nq"), read_prompt(PROMPT), "train", 7)
    truth = {"target": ["A B", "B"]}
    assert row["data_source"] == "searchR1_nq" and row["agent_name"] == "tool_agent"
    assert row["ability"] == "fact-reasoning"
    assert row["reward_model"] == {"style": "rule", "ground_truth": truth}
    assert row["extra_info"]["index"] == 7 and row["extra_info"]["need_tools_kwargs"] is True
    assert row["extra_info"]["tools_kwargs"]["search"]["create_kwargs"] == {
        "ground_truth": truth, "question": "who wrote it", "data_source": "searchR1_nq",
    }  # fmt: skip
    system, user = row["prompt"]
    assert system["role"] == "system" and user["content"].endswith("Question: who wrote it?")


def test_a_question_cannot_write_into_the_prompt(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("user: '{question} {0} {x}'")
    row = make_row(Question("{question} %s \\1?", ["a"], "nq"), read_prompt(file), "train", 0)
    assert row["prompt"] == [{"role": "user", "content": "{question} %s \\1? {0} {x}"}]


@pytest.mark.parametrize(
    "text",
    [
        "system_content: You help.\nuser_content_prefix: 'Answer. Question: '\n",
        "prompt:\n  system_content: You help.\n  user_content_prefix: 'Answer. Question: '\n",
        "system: You help.\nuser: 'Answer. Question: {question}'\n",
    ],
)
def test_prompts_of_others_load_unchanged(tmp_path: Path, text: str) -> None:
    file = tmp_path / "prompt.yaml"
    file.write_text(text)
    assert read_prompt(file).messages("who?") == [
        {"role": "system", "content": "You help."},
        {"role": "user", "content": "Answer. Question: who?"},
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not a mapping"),
        ("[", "cannot be read"),
        ("system: a", "has no place for the question"),
        ("user: hello", "has no place for the question"),
        ("user: [a]", "user is not a text"),
        ("usr: '{question}'", "unknown key 'usr'"),
        ("user: !!python/object/apply:os.system ['true']", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_prompt_is_named(tmp_path: Path, text: str | None, says: str) -> None:
    file = tmp_path / "p.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_prompt(file)


def test_published_folders_are_read(tmp_path: Path) -> None:
    source = tmp_path / "FlashRAG_datasets"
    jsonl(source / "nq/train.jsonl", [{"id": "0", "question": "q0", "golden_answers": ["a"]}])
    jsonl(source / "hotpotqa/train.jsonl", [{"question": "q1?", "golden_answers": ["b"], "metadata": {}}])
    jsonl(source / "hotpotqa/dev.jsonl", [{"question": "q2", "golden_answers": ["c"]}])
    jsonl(source / "retrieval-corpus/wiki18.jsonl", [{"id": "0", "contents": "T\nx"}])
    assert prepare(str(source), tmp_path / "out") == {"train.parquet": 2, "test.parquet": 1}
    assert sorted(row["data_source"] for row in rows_of(tmp_path / "out/train.parquet")) == [
        "searchR1_hotpotqa", "searchR1_nq",
    ]  # fmt: skip

    source = tmp_path / "nq_hotpotqa_train"
    source.mkdir()
    for split, count in (("train", 3), ("test", 2)):
        rows = [{"question": f"q{i}?", "golden_answers": ["a"], "data_source": "nq"} for i in range(count)]
        pq.write_table(pa.Table.from_pylist(rows), source / f"{split}.parquet")
    assert prepare(str(source), tmp_path / "out") == {"train.parquet": 3, "test.parquet": 2}


def test_a_source_with_one_split_is_divided(tmp_path: Path) -> None:
    jsonl(tmp_path / "s/nq_open_dev_500.jsonl", [{"question": f"q{i}", "answer": ["a", "b"]} for i in range(10)])
    jsonl(tmp_path / "s/corpus.jsonl", [{"id": "0", "contents": "T\nx"}])
    assert prepare(str(tmp_path / "s"), tmp_path / "out") == {"train.parquet": 8, "test.parquet": 2}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"golden_answers": ["a"]}, "has no text 'question'"),
        ({"question": " ", "golden_answers": ["a"]}, "has no text 'question'"),
        ({"question": "q"}, "has no list of texts 'golden_answers'"),
        ({"question": "q", "golden_answers": []}, "golden_answers"),
        ({"question": "q", "golden_answers": [1]}, "golden_answers"),
        ({"question": "q", "golden_answers": [""]}, "golden_answers"),
        ([], "has no text 'question'"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: Any, says: str) -> None:
    jsonl(tmp_path / "train.jsonl", [{"question": "q", "golden_answers": ["a"]}, row])
    with pytest.raises(DataError, match=rf"train.jsonl, line 2 .*{says}"):
        prepare(str(tmp_path), tmp_path / "out")


def test_a_wrong_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no \.jsonl or \.parquet file"):
        prepare(str(tmp_path), tmp_path / "out")
    with pytest.raises(DataError, match="is not a folder"):
        prepare("./nowhere", tmp_path / "out")
    (tmp_path / "train.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"train.jsonl, line 1 is not valid JSON"):
        prepare(str(tmp_path), tmp_path / "out")


def test_generated_questions_are_answered_by_the_generated_corpus(tmp_path: Path) -> None:
    counts = prepare_rows("search", "generated", tmp_path, PROMPT)
    assert counts == {"train.parquet": 64, "test.parquet": 16, "corpus.jsonl": 100}
    texts = [passage["contents"] for passage in passages()]
    train, test = questions("train"), questions("test")
    for row in train + test:
        name = row["question"].removeprefix("Where was ").removesuffix(" born?")
        (text,) = [text for text in texts if text.startswith(f'"{name}"')]
        assert f"born in {row['golden_answers'][0]}." in text
    assert not {row["question"] for row in train} & {row["question"] for row in test}


def test_the_open_questions_beside_the_repository(shared: Path, tmp_path: Path) -> None:
    counts = prepare(str(shared / "data/search_r1"), tmp_path)
    assert counts == {"train.parquet": 400, "test.parquet": 100}
