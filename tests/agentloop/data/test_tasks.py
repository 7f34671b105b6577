"""Rows: accepted and refused ones with their messages, and an order that a resumed run reproduces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agentloop.data import ImageMarks, RowOrder, load_tasks, row_images
from agentloop.data.tasks import CutText
from agentloop.errors import DataError
from agentloop.types import Trajectory

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


def part(**keys: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [keys]}]


def test_a_row_becomes_a_task(tmp_path: Path) -> None:
    tasks = load_tasks(write(tmp_path / "a.jsonl", ROW), "data.train", "default")
    assert (tasks[0].task_id, tasks[0].agent_name, tasks[0].ground_truth) == ("5", "tool_agent", "2")
    assert tasks[0].prompt == ROW["prompt"]


def test_jsonl_and_parquet_give_the_same_tasks(tmp_path: Path) -> None:
    row = {**ROW, "extra_info": {"index": 5, "tools_kwargs": {"calc": {"create_kwargs": {"ground_truth": "2"}}}}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    from_parquet = load_tasks(str(tmp_path / "a.parquet"), "data.train", "d")
    from_jsonl = load_tasks(write(tmp_path / "a.jsonl", row), "data.train", "d")
    assert list(from_parquet) == list(from_jsonl)
    assert from_parquet[0].tool_kwargs("calc") == {"create_kwargs": {"ground_truth": "2"}}
    assert from_parquet[0].tool_kwargs("other") == {}


def test_nulls_that_parquet_fills_in_are_left_out(tmp_path: Path) -> None:
    image, text = {"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}
    row = {"prompt": [{"role": "user", "content": [image, text]}], "extra_info": {"index": None}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    tasks = load_tasks(str(tmp_path / "a.parquet"), "data.train", "d")
    located = {"type": "image", "image": str(tmp_path / "a.png")}
    assert tasks[0].prompt == [{"role": "user", "content": [located, text]}] and tasks[0].task_id == "0"


def test_rows_without_an_agent_get_the_default_and_are_told_apart(tmp_path: Path) -> None:
    row = {key: value for key, value in ROW.items() if key != "agent_name"}
    tasks = load_tasks(write(tmp_path / "a.jsonl", row, ROW, row), "data.train", "fallback")
    assert [(task.agent_name, named) for task, named in tasks.walk()] == [
        ("fallback", False),
        ("tool_agent", True),
        ("fallback", False),
    ]


def test_a_selection_keeps_the_numbers_of_its_rows(tmp_path: Path) -> None:
    rows = [{**ROW, "extra_info": {}, "prompt": [{"role": "user", "content": str(i)}]} for i in range(6)]
    source = write(tmp_path / "a.jsonl", *rows)
    chosen = load_tasks(source, "data.train", "d")[1:].select([0, 2, 4]).select([1, 2])
    assert [task.task_id for task in chosen] == ["3", "5"] and len(chosen) == 2
    assert [chosen[-1].prompt[0]["content"], chosen[0].prompt[0]["content"]] == ["5", "3"]
    assert chosen.where(1) == f"{source}, row 5 (line 6)"
    with pytest.raises(IndexError):
        chosen[2]
    cut = chosen.select([0, 1], {1: CutText(0, None, "shorter")}).select([1, 0])
    assert [task.prompt[0]["content"] for task in cut] == ["shorter", "3"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": None}, r"row 1 \(line 2\) has no column 'prompt'"),
        ({"prompt": "text"}, "'prompt' is not a list"),
        ({"prompt": [{"role": "robot", "content": "x"}]}, "prompt message 1 has the role 'robot'"),
        ({"prompt": [{"role": "user"}]}, "prompt message 1 has no content"),
        ({"reward_model": 3}, "'reward_model' is not an object"),
        ({"reward_model": "{"}, "'reward_model' is text that is not JSON"),
        ({"extra_info": [1]}, "'extra_info' is not an object"),
        ({"extra_info": {"tools_kwargs": ["calc"]}}, "'extra_info.tools_kwargs' is not an object"),
        ({"extra_info": {"tools_kwargs": {"calc": ["F"]}}}, "'extra_info.tools_kwargs.calc' is not an object"),
        (
            {"extra_info": {"tools_kwargs": {"calc": {"create_kwargs": ["F"]}}}},
            "'extra_info.tools_kwargs.calc.create_kwargs' is not an object",
        ),
        ({"extra_info": {"tools_kwargs": {"calc": {"create": {}}}}}, "tools_kwargs.calc' has the key 'create'"),
        ({"extra_info": {"interaction_kwargs": "patient"}}, "interaction_kwargs' is text that is not JSON"),
        ({"extra_info": {"interaction_kwargs": ["patient"]}}, "'extra_info.interaction_kwargs' is not an object"),
        ({"agent_name": ["a"]}, "'agent_name' is \\['a'\\]"),
        ({"images": 3}, "'images', image 1 is 3"),
        ({"videos": ["a.mp4"]}, "has videos: only text and images can be used"),
        ({"prompt": [{"role": "user", "content": [{"type": "video", "video": "a"}]}]}, "a part of type 'video'"),
        ({"images": [None]}, "'images', image 1 is None"),
        ({"images": [{"bytes": None, "path": None}]}, "'images', image 1 is {'bytes'"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "0 images and 1 place"),
        ({"images": [{"bytes": [137] * 9999}]}, "'images', image 1 is {'bytes': \\[137, 137, .*\\.\\.\\.\\]}"),
        ({"prompt": part(type="image", image={})}, "column 'prompt': the image of a content part is {}"),
        ({"prompt": part(type="image", image=["a"])}, "the image of a content part is \\['a'\\]"),
        ({"prompt": part(type="image", url="")}, "the url of a content part is ''"),
        (
            {"prompt": part(type="image_url", image_url={"detail": "low"})},
            "the image_url of a content part is {'detail'",
        ),
        ({"prompt": part(type="image", source={"data": "AA=="}), "images": ["a"]}, "has it under 'source'"),
        ({"prompt": part(type="text", text="x", image="a")}, "a part with a text and an image"),
        ({"prompt": part(text="x", image="a")}, "a part with a text and an image"),
        ({"prompt": [{"role": "user", "content": "<image>x"}], "image": "a.png"}, "read from column 'images'"),
        ({"prompt": "[1"}, "'prompt' is text that is not JSON"),
        ({"prompt": [{"role": ["user"], "content": "x"}]}, "prompt message 1 has the role"),
        ({"prompt": [{"role": "user", "content": 3}]}, "prompt message 1 has content of type int"),
        ({"prompt": [{"role": "user", "content": [{"type": "audio"}]}]}, "message 1 has a part of type 'audio'"),
        ({"prompt": [{"role": "user", "content": [3]}]}, "message 1 has a part of type int"),
        ({"prompt": [{"role": "user", "content": []}]}, "message 1 has no content"),
        ({"prompt": [{"role": "assistant", "content": None}]}, "message 1 has no content"),
        ({"prompt": [{"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}]}, "role user has tool calls"),
        ({"prompt": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "a tool call without a name"),
        ({"prompt": [{"role": "assistant", "tool_calls": 3}]}, "tool_calls is not a list"),
        (
            {"prompt": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "the arguments of f is text that is not JSON",
        ),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        list(load_tasks(write(tmp_path / "rows.jsonl", ROW, {**ROW, **row}), "data.train", "d"))
    assert "rows.jsonl, row 1 (line 2)" in str(caught.value)


def test_each_epoch_sees_every_row_once_in_an_order_of_its_own() -> None:
    order = RowOrder(10, seed=3, shuffle=True)
    epochs = [[order[i] for i in range(e * 10, e * 10 + 10)] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = RowOrder(10, seed=3, shuffle=True)
    assert [again[i] for i in (25, 3, 17)] == [epochs[2][5], epochs[0][3], epochs[1][7]]
    assert [RowOrder(4, seed=0, shuffle=False)[i] for i in range(6)] == [0, 1, 2, 3, 0, 1]


def test_images_as_a_table_writes_them(tmp_path: Path) -> None:
    """JSON text, and the NaN that stands for a gap."""
    for text in ('["a.png"]', '{"path": "a.png"}'):
        [task] = load_tasks(write(tmp_path / "a.jsonl", {**image_row("<image>"), "images": text}), "data.train", "d")
        assert task.images == [str(tmp_path / "a.png")]
    assert row_images({"images": float("nan")}, "row 0", tmp_path) == []
    assert row_images({"images": ["DATA:image/png;base64,AA==", "FILE:///a"]}, "", tmp_path)[0].startswith("DATA")


def image_row(content: Any, *images: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": content}], "images": list(images)}


def test_images_stand_where_their_marks_are(tmp_path: Path) -> None:
    row = image_row("<image>Which is larger, it or <image>?", "a.png", {"bytes": None, "path": "b.png"})
    tasks = load_tasks(write(tmp_path / "a.jsonl", row), "data.train", "d")
    assert tasks[0].prompt[0]["content"] == [
        {"type": "image", "image": str(tmp_path / "a.png")},
        {"type": "text", "text": "Which is larger, it or "},
        {"type": "image", "image": str(tmp_path / "b.png")},
        {"type": "text", "text": "?"},
    ]
    parts = [{"type": "text", "text": "Look:"}, {"type": "image"}]
    tasks = load_tasks(write(tmp_path / "b.jsonl", image_row(parts, "/c.png")), "data.train", "d")
    assert tasks[0].prompt[0]["content"] == [parts[0], {"type": "image", "image": "/c.png"}]


def test_a_part_can_hold_its_image_itself(tmp_path: Path) -> None:
    url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    parts = [{"type": "image", "path": "a.png"}, {"type": "image"}, url, {"type": "image", "base64": "AA=="}]
    tasks = load_tasks(write(tmp_path / "a.jsonl", image_row(parts, "b.png")), "data.train", "d")
    data = "data:image/png;base64,AA=="
    shown = [str(tmp_path / "a.png"), str(tmp_path / "b.png"), data, data.replace("png", "unknown")]
    assert tasks[0].prompt[0]["content"] == [{"type": "image", "image": image} for image in shown]


def test_image_data_in_parquet_is_kept(tmp_path: Path) -> None:
    row = image_row("<image>", {"bytes": b"png", "path": "a.png"})
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    tasks = load_tasks(str(tmp_path / "a.parquet"), "data.train", "d")
    assert tasks[0].prompt[0]["content"] == [{"type": "image", "image": {"bytes": b"png", "path": "a.png"}}]


@pytest.mark.parametrize(("content", "places"), [("no place", 0), ("<image><image>", 2)])
def test_a_row_with_more_or_fewer_images_than_places_is_named(tmp_path: Path, content: str, places: int) -> None:
    source = write(tmp_path / "a.jsonl", ROW, image_row(content, "a.png"))
    with pytest.raises(DataError, match=rf"row 1 \(line 2\) has 1 image and {places} places"):
        list(load_tasks(source, "data.train", "d"))


def test_a_mark_in_a_row_without_images_is_text(tmp_path: Path) -> None:
    tasks = load_tasks(write(tmp_path / "a.jsonl", image_row("an <image> tag")), "data.train", "d")
    assert tasks[0].prompt[0]["content"] == "an <image> tag"


@pytest.mark.parametrize("columns", [{}, {"images": None}, {"images": []}, {"images": "[]"}])
def test_a_mark_without_an_image_is_refused_for_a_model_with_images(tmp_path: Path, columns: dict[str, Any]) -> None:
    marked = {"prompt": [{"role": "user", "content": "<image>What?"}], **columns}
    tasks = load_tasks(write(tmp_path / "a.jsonl", ROW, marked), "data.train", "d", takes_images=True)
    for selected in (tasks, tasks.select([1])):
        with pytest.raises(DataError, match=r"row 1 \(line 2\) has 0 images and 1 place in column 'prompt'") as caught:
            list(selected)
        assert "remove the <image>, or add the missing image to column 'images'" in str(caught.value)


@pytest.mark.parametrize(
    ("column", "value", "named"),
    [
        ("imgs", ["a.png"], True),
        ("iamges", [{"bytes": b"x".hex(), "path": None}], True),
        ("question_figure", {"path": "x"}, True),
        ("file", "pics/a.JPG", True),
        ("media", '["a.webp"]', True),
        ("url", "data:image/png;base64,AA==", True),
        ("image_count", 3, False),
        ("ability", "a.png", False),
        ("topic", "epic", False),
        ("pages", ["1"], False),
        ("img", None, False),
    ],
)
def test_the_column_that_seems_to_hold_the_images_is_named(
    tmp_path: Path, column: str, value: Any, named: bool
) -> None:
    row = {"prompt": [{"role": "user", "content": "<image>What?"}], column: value}
    with pytest.raises(DataError, match="0 images and 1 place") as caught:
        list(load_tasks(write(tmp_path / "a.jsonl", row), "data.train", "d", takes_images=True))
    assert (f"column {column!r} seems to hold them" in str(caught.value)) == named
    assert (caught.value.hint == f"rename column {column!r} to 'images'") == named


def test_a_mark_in_the_models_own_message_is_text(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "A tag?"}, {"role": "assistant", "content": "<image>"}]
    [task] = load_tasks(write(tmp_path / "a.jsonl", {"prompt": prompt}), "data.train", "d", takes_images=True)
    assert task.prompt == prompt


@pytest.mark.parametrize(
    ("content", "images", "fix"),
    [
        ("x", 1, "write <image> in the text where each image belongs, or remove the image from column 'images'"),
        ("<image>", 2, "belongs, or remove one of the images from"),
        ("<image><image>", 1, "remove one of the <image>, or add the missing image to column 'images'"),
        ("<image>" * 3, 1, "remove 2 of the <image>, or add the missing images to column 'images'"),
        ([{"type": "image"}], 0, "remove the image part, or add the missing image to column 'images'"),
    ],
)
def test_the_fix_of_a_wrong_count_points_the_right_way(tmp_path: Path, content: Any, images: int, fix: str) -> None:
    source = write(tmp_path / "a.jsonl", image_row(content, *["a.png"] * images))
    with pytest.raises(DataError) as caught:
        list(load_tasks(source, "data.train", "d"))
    assert fix in str(caught.value.hint)


def test_a_mark_without_an_image_beside_rows_with_images_is_refused_for_any_model(tmp_path: Path) -> None:
    marked, shown, text = image_row("an <image> tag"), image_row("<image>", "a.png"), image_row("text")
    for rows in ((marked, text, shown), (shown, text, marked)):
        tasks, marks = load_tasks(write(tmp_path / "a.jsonl", *rows), "data.train", "d"), ImageMarks()
        with pytest.raises(DataError, match=rf"row {rows.index(marked)} .* has 0 images and 1 place"):
            for index, task in enumerate(tasks):
                marks.check(task, tasks.where(index))
    for index, task in enumerate(load_tasks(write(tmp_path / "a.jsonl", marked, text), "data.train", "d")):
        marks = ImageMarks()
        marks.check(task, str(index))


def test_a_trace_shows_images_by_their_kind() -> None:
    content = [{"type": "image", "image": b"png"}, {"type": "text", "text": "x"}]
    trajectory = Trajectory([1], [0], [None], [None], 1, messages=[{"role": "user", "content": content}])
    assert trajectory.to_json()["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "x"}]


def only(folder: Path, row: dict[str, Any], name: str = "one.jsonl") -> Any:
    return load_tasks(write(folder / name, row), "data.train", "d")[0]


def test_the_shapes_of_openai_are_read_as_plain_messages(tmp_path: Path) -> None:
    call = {"function": {"name": "calc", "arguments": '{"x": "1+1"}'}}
    prompt = [
        {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}], "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "content": None},
        {"role": "assistant", "content": "2", "thinking": "easy"},
    ]
    for form in (prompt, json.dumps(prompt)):
        task = only(tmp_path, {**ROW, "prompt": form})
        assert task.prompt == [
            {"role": "user", "content": "hello"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"type": "function", "id": "c00010000", "function": {"name": "calc", "arguments": {"x": "1+1"}}}
                ],
            },
            {"role": "tool", "content": "", "tool_call_id": "c00010000", "name": "calc"},
            {"role": "assistant", "content": "2", "reasoning_content": "easy"},
        ]


def test_arguments_that_only_other_rows_have_are_left_out(tmp_path: Path) -> None:
    def row(kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**ROW, "extra_info": {"tools_kwargs": {"calc": {"create_kwargs": kwargs}}}}

    table = [row({"unit": "F", "o": {"a": 1}}), row({"city": "Rome", "o": {"b": 2}}), {**ROW, "extra_info": {"x": 1}}]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "a.parquet")
    tasks = load_tasks(str(tmp_path / "a.parquet"), "data.train", "d")
    assert [task.tool_kwargs("calc").get("create_kwargs") for task in tasks] == [
        {"unit": "F", "o": {"a": 1}},
        {"city": "Rome", "o": {"b": 2}},
        None,
    ]
    # pydantic writes unset fields into jsonl
    task = only(tmp_path, row({"unit": None, "city": "Rome", "o": {"a": None}}))
    assert task.tool_kwargs("calc") == {"create_kwargs": {"city": "Rome", "o": {"a": None}}}
    task = only(tmp_path, {**ROW, "extra_info": {"interaction_kwargs": {"name": "x", "hint": None}}})
    assert task.interaction_kwargs == {"name": "x"}


def test_arguments_as_json_text_are_read(tmp_path: Path) -> None:
    kwargs = {"calc": {"create_kwargs": {"unit": "F"}}}
    for value in (
        json.dumps(kwargs),
        {"calc": json.dumps(kwargs["calc"])},
        {"calc": {"create_kwargs": '{"unit": "F"}'}},
    ):
        task = only(tmp_path, {**ROW, "extra_info": {"tools_kwargs": value, "interaction_kwargs": '{"name": "x"}'}})
        assert task.tool_kwargs("calc") == kwargs["calc"] and task.interaction_kwargs == {"name": "x"}
    task = only(tmp_path, {**ROW, "extra_info": json.dumps({"index": 3}), "reward_model": '{"ground_truth": 5}'})
    assert (task.task_id, task.ground_truth) == ("3", 5)


def test_numbers_of_a_row_stay_what_they_are(tmp_path: Path) -> None:
    for truth in (10**30 + 5, 2**64 - 1, -(2**63), 72.5, "72"):
        assert only(tmp_path, {**ROW, "reward_model": {"ground_truth": truth}}).ground_truth == truth
    gap = float("nan")  # what pandas makes of integers when one is missing
    made = [
        {**ROW, "reward_model": {"ground_truth": truth}, "extra_info": {"index": index}}
        for truth, index in ((72.0, 7.0), (gap, gap))
    ]
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "a.parquet")
    tasks = load_tasks(str(tmp_path / "a.parquet"), "data.train", "d")
    assert [task.task_id for task in tasks] == ["7", "1"], "an index with a gap is not 7.0"
    assert (tasks[0].ground_truth, tasks[1].ground_truth) == (72.0, None)


def test_a_single_image_needs_no_list(tmp_path: Path) -> None:
    task = only(tmp_path, {**image_row("<image>"), "images": "a.png"})
    assert task.prompt[0]["content"] == [{"type": "image", "image": str(tmp_path / "a.png")}]
    assert only(tmp_path, {**image_row("text"), "images": None}).images == []
