"""Rows: what is accepted, what is refused and how that is said, and an order that a resumed run finds again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agentloop.chat import ChatRenderer
from agentloop.data import RowOrder, check_agents, drop_overlong, load_tasks
from agentloop.errors import ConfigError, DataError, ModelError, RegistryError
from agentloop.prepare import gsm8k_row, prepare_gsm8k
from agentloop.rewards.gsm8k import compute_score, extract_answer
from agentloop.types import Task, Trajectory

ROW: dict[str, Any] = {
    "data_source": "t",
    "agent_name": "tool_agent",
    "prompt": [{"role": "user", "content": "What is 1 + 1?"}],
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"index": 5},
}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_a_row_becomes_a_task(tmp_path: Path) -> None:
    tasks, without = load_tasks(write(tmp_path / "a.jsonl", ROW), "data.train", "default")
    assert without == 0
    assert (tasks[0].task_id, tasks[0].agent_name, tasks[0].ground_truth) == ("5", "tool_agent", "2")
    assert tasks[0].prompt == ROW["prompt"]


def test_jsonl_and_parquet_give_the_same_tasks(tmp_path: Path) -> None:
    row = {**ROW, "extra_info": {"index": 5, "tools_kwargs": {"calc": {"create_kwargs": {"ground_truth": "2"}}}}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    from_parquet, _ = load_tasks(str(tmp_path / "a.parquet"), "data.train", "d")
    from_jsonl, _ = load_tasks(write(tmp_path / "a.jsonl", row), "data.train", "d")
    assert from_parquet == from_jsonl
    assert from_parquet[0].tool_kwargs("calc") == {"create_kwargs": {"ground_truth": "2"}}
    assert from_parquet[0].tool_kwargs("other") == {}


def test_nulls_that_parquet_fills_in_are_left_out(tmp_path: Path) -> None:
    image, text = {"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}
    row = {"prompt": [{"role": "user", "content": [image, text]}], "extra_info": {"index": None}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    tasks, _ = load_tasks(str(tmp_path / "a.parquet"), "data.train", "d")
    assert tasks[0].prompt == row["prompt"] and tasks[0].task_id == "0"


def test_rows_without_an_agent_get_the_default_and_are_counted(tmp_path: Path) -> None:
    row = {key: value for key, value in ROW.items() if key != "agent_name"}
    tasks, without = load_tasks(write(tmp_path / "a.jsonl", row, ROW, row), "data.train", "fallback")
    assert without == 2 and [t.agent_name for t in tasks] == ["fallback", "tool_agent", "fallback"]


def test_rows_can_come_from_a_function(tmp_path: Path) -> None:
    (tmp_path / "rows.py").write_text(f"def make():\n    return [{ROW!r}] * 3\n")
    assert len(load_tasks(f"{tmp_path / 'rows.py'}:make", "data.train", "d")[0]) == 3
    with pytest.raises(ConfigError, match="has no 'other'"):
        load_tasks(f"{tmp_path / 'rows.py'}:other", "data.train", "d")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": None}, "row 2 has no column 'prompt'"),
        ({"prompt": "text"}, "'prompt' is no list"),
        ({"prompt": [{"role": "robot", "content": "x"}]}, "prompt message 1 has the role 'robot'"),
        ({"prompt": [{"role": "user"}]}, "prompt message 1 has no content"),
        ({"reward_model": 3}, "'reward_model' is no mapping"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        load_tasks(write(tmp_path / "rows.jsonl", ROW, {**ROW, **row}), "data.train", "d")
    assert "rows.jsonl, row 2" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"prompt": ', "row 1 is not valid JSON"),
        ("a.jsonl", "[1]", "row 1 is no mapping"),
        ("a.jsonl", "", "holds no rows"),
        ("a.csv", "x", "neither .jsonl nor .parquet"),
        ("a.parquet", "x", "cannot be read as parquet"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, name: str, content: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        load_tasks(write(tmp_path / name, content), "data.val", "d")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.val: .*none.jsonl does not exist"):
        load_tasks(str(tmp_path / "none.jsonl"), "data.val", "d")


def test_an_unknown_agent_names_row_name_and_the_known() -> None:
    tasks = [Task(str(i), name, []) for i, name in enumerate(["a", "b"])]
    with pytest.raises(RegistryError, match=r"data.train: row 2 has agent_name 'b'; known: a, c"):
        check_agents(tasks, ["c", "a"], "data.train")


def test_long_prompts_are_dropped_or_refused_tool_schemas_counted(renderer: ChatRenderer, calculator: Any) -> None:
    short = Task("0", "a", [{"role": "user", "content": "1"}])
    long = Task("1", "a", [{"role": "user", "content": "1" * 50}])
    limit = len(renderer.start(short.prompt, calculator.schemas))
    assert drop_overlong([short, long], renderer, calculator.schemas, limit, "drop", "data.train") == [short]
    with pytest.raises(DataError, match=r"row 2 has .* tokens"):
        drop_overlong([short, long], renderer, calculator.schemas, limit, "error", "data.train")
    with pytest.raises(DataError, match="every prompt is longer"):
        drop_overlong([short], renderer, calculator.schemas, limit - 1, "drop", "data.train")


def test_each_epoch_sees_every_row_once_in_an_order_of_its_own() -> None:
    order = RowOrder(10, seed=3, shuffle=True)
    epochs = [[order[i] for i in range(e * 10, e * 10 + 10)] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = RowOrder(10, seed=3, shuffle=True)
    assert [again[i] for i in (25, 3, 17)] == [epochs[2][5], epochs[0][3], epochs[1][7]]
    assert [RowOrder(4, seed=0, shuffle=False)[i] for i in range(6)] == [0, 1, 2, 3, 0, 1]


def test_gsm8k_rows_have_tool_and_ground_truth() -> None:
    row = gsm8k_row({"question": "How many?", "answer": "1 + 1 = 2\n#### 1,234"}, "train", 0)
    assert row["reward_model"]["ground_truth"] == "1234" and row["agent_name"] == "tool_agent"
    assert row["extra_info"]["tools_kwargs"]["calc_gsm8k_reward"]["create_kwargs"] == {"ground_truth": "1234"}
    assert row["prompt"][0]["role"] == "system" and "calc_gsm8k_reward" in row["prompt"][0]["content"]


@pytest.mark.parametrize("row", [{"question": "q", "answer": "no mark"}, {"answer": "#### 1"}])
def test_a_gsm8k_row_without_answer_or_question_is_named(row: dict[str, str]) -> None:
    with pytest.raises(DataError, match="train, row 4 has no"):
        gsm8k_row(row, "train", 3)


def test_gsm8k_is_prepared_whole_or_not_at_all(tmp_path: Path) -> None:
    good = {"question": "q", "answer": "#### 3"}
    write(tmp_path / "train.jsonl", good, good)
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"holds no test\.jsonl"):
        prepare_gsm8k(str(tmp_path), out)
    assert not list(out.glob("*"))
    write(tmp_path / "test.jsonl", good)
    assert prepare_gsm8k(str(tmp_path), out) == {"train": 2, "test": 1}
    tasks, _ = load_tasks(str(out / "train.parquet"), "data.train", "d")
    assert tasks[1].ground_truth == "3" and tasks[1].task_id == "1"


def test_gsm8k_reads_the_hubs_own_layout(tmp_path: Path) -> None:
    (tmp_path / "main").mkdir()
    for split in ("train", "test"):
        table = pa.Table.from_pylist([{"question": "q", "answer": "#### 3"}])
        pq.write_table(table, tmp_path / "main" / f"{split}-00000-of-00001.parquet")
    assert prepare_gsm8k(str(tmp_path), tmp_path / "out") == {"train": 1, "test": 1}


def test_a_data_set_that_cannot_be_downloaded_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="cannot be downloaded"):
        prepare_gsm8k("no such/data set/at all", tmp_path)


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("#### 12", "12", "12"),
        ("#### 1,234.", "1234", "1234"),
        ("so 5 it is", None, "5"),
        ("#### 3 no #### -4", "-4", "-4"),
        ("#### 3" + "x" * 400, None, "3"),
        ("none", None, None),
    ],
)
def test_gsm8k_answers(text: str, strict: str | None, flexible: str | None) -> None:
    assert (extract_answer(text), extract_answer(text, "flexible")) == (strict, flexible)


def test_gsm8k_scores() -> None:
    assert compute_score("#### 1,000", "1000") == 1.0
    assert compute_score("#### 2", "1") == 0.0
    assert compute_score("#### 2", "1", format_score=0.1) == 0.1
    assert compute_score("2", "1", format_score=0.1) == 0.0


def image_row(content: Any, *images: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": content}], "images": list(images)}


def test_images_stand_where_their_marks_are(tmp_path: Path) -> None:
    row = image_row("<image>Which is larger, it or <image>?", "a.png", {"bytes": None, "path": "b.png"})
    tasks, _ = load_tasks(write(tmp_path / "a.jsonl", row), "data.train", "d")
    assert tasks[0].prompt[0]["content"] == [
        {"type": "image", "image": str(tmp_path / "a.png")},
        {"type": "text", "text": "Which is larger, it or "},
        {"type": "image", "image": str(tmp_path / "b.png")},
        {"type": "text", "text": "?"},
    ]
    parts = [{"type": "text", "text": "Look:"}, {"type": "image"}]
    tasks, _ = load_tasks(write(tmp_path / "b.jsonl", image_row(parts, "/c.png")), "data.train", "d")
    assert tasks[0].prompt[0]["content"] == [parts[0], {"type": "image", "image": "/c.png"}]


def test_image_data_in_parquet_is_kept(tmp_path: Path) -> None:
    row = image_row("<image>", {"bytes": b"png", "path": "a.png"})
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    tasks, _ = load_tasks(str(tmp_path / "a.parquet"), "data.train", "d")
    assert tasks[0].prompt[0]["content"] == [{"type": "image", "image": {"bytes": b"png", "path": "a.png"}}]


@pytest.mark.parametrize(("content", "places"), [("no place", 0), ("<image><image>", 2)])
def test_a_row_with_more_or_fewer_images_than_places_is_named(tmp_path: Path, content: str, places: int) -> None:
    source = write(tmp_path / "a.jsonl", ROW, image_row(content, "a.png"))
    with pytest.raises(DataError, match=f"row 2 has 1 images and {places} places"):
        load_tasks(source, "data.train", "d")


def test_a_mark_in_a_row_without_images_is_text(tmp_path: Path) -> None:
    tasks, _ = load_tasks(write(tmp_path / "a.jsonl", image_row("an <image> tag")), "data.train", "d")
    assert tasks[0].prompt[0]["content"] == "an <image> tag"


def test_a_prompt_that_cannot_be_rendered_is_named(tmp_path: Path, renderer: ChatRenderer) -> None:
    tasks, _ = load_tasks(write(tmp_path / "a.jsonl", ROW, image_row("<image>", "a.png")), "data.train", "d")
    with pytest.raises(ModelError, match=r"data\.train: row 2: the chat template cannot render"):
        drop_overlong(tasks, renderer, None, 100, "drop", "data.train")


def test_a_trace_shows_images_by_their_kind() -> None:
    content = [{"type": "image", "image": b"png"}, {"type": "text", "text": "x"}]
    trajectory = Trajectory([1], [0], [None], [None], 1, messages=[{"role": "user", "content": content}])
    assert trajectory.to_json()["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "x"}]
