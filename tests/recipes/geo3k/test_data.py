"""geometry3k in either of its layouts becomes rows in the published form, images included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agentloop.data import load_tasks
from agentloop.errors import DataError
from agentloop.images import read_image
from recipes.geo3k.data import TOOL, prepare

FILES = ["train.parquet", "test.parquet", "tools_train.parquet", "tools_test.parquet"]


def write(folder: Path, number: int, **changes: Any) -> Path:
    """A problem in geometry3k's own layout."""
    from PIL import Image

    place = folder / str(number)
    place.mkdir(parents=True)
    row = {"annotat_text": f"Find $x_{number}$.", "compact_choices": ["1", "2", "5\\sqrt{3}"], "answer": "C"}
    (place / "data.json").write_text(json.dumps(row | changes))
    Image.new("RGB", (60 + number, 40), "white").save(place / "img_diagram.png")
    return place


def test_generated_rows_are_in_the_published_form(tmp_path: Path) -> None:
    counts = prepare("generated", tmp_path)
    assert list(counts) == FILES and counts["train.parquet"] == 48
    plain = pq.read_table(tmp_path / "train.parquet").to_pylist()[0]
    assert plain["data_source"] == "hiyouga/geometry3k" and plain["agent_name"] == "single_turn_agent"
    assert [message["role"] for message in plain["prompt"]] == ["user"]
    assert plain["prompt"][0]["content"].startswith("<image>Find ") and r"\boxed{}" in plain["prompt"][0]["content"]
    assert "<think>" in plain["prompt"][0]["content"] and set(plain["images"][0]) == {"bytes", "path"}
    tools = pq.read_table(tmp_path / "tools_train.parquet").to_pylist()[0]
    assert tools["agent_name"] == "tool_agent" and TOOL in tools["prompt"][0]["content"]
    truth = plain["reward_model"]["ground_truth"]
    assert tools["extra_info"]["tools_kwargs"] == {TOOL: {"create_kwargs": {"ground_truth": truth}}}
    assert tools["extra_info"]["need_tools_kwargs"] is True

    for name in FILES:
        for task in load_tasks(str(tmp_path / name), "data.train", "d"):
            image, text = task.prompt[-1]["content"]
            assert read_image(image["image"]).width >= 240 and "Find" in text["text"]  # type: ignore[index]
    assert counts == prepare("generated", tmp_path / "again")
    assert (tmp_path / "again" / "train.parquet").read_bytes() == (tmp_path / "train.parquet").read_bytes()


def test_real_problems_keep_question_image_and_answer(tmp_path: Path, shared: Path) -> None:
    source = shared / "data" / "geometry3k"
    counts = prepare(str(source), tmp_path)
    assert counts["train.parquet"] + counts["test.parquet"] == len(list(source.rglob("data.json")))
    rows = [row for name in FILES[:2] for row in pq.read_table(tmp_path / name).to_pylist()]
    fifteen = next(row for row in rows if row["images"][0]["path"].startswith("15/"))
    assert fifteen["reward_model"]["ground_truth"] == "5\\sqrt{3}"
    assert fifteen["prompt"][0]["content"].startswith("<image>Find y. ")
    assert fifteen["images"][0]["bytes"] == (source / "15" / "img_diagram.png").read_bytes()


def test_splits_are_the_sources_own_if_it_has_them(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for number in range(6):
        write(source / "deep", number, data_type="test" if number == 3 else "train")
    assert prepare(str(source), tmp_path / "out")["train.parquet"] == 5
    [row] = pq.read_table(tmp_path / "out" / "test.parquet").to_pylist()
    assert "x_3" in row["prompt"][0]["content"] and row["extra_info"]["split"] == "test"


def test_the_hubs_layout_is_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    image = {"bytes": (write(tmp_path / "x", 1) / "img_diagram.png").read_bytes(), "path": None}
    shutil.rmtree(tmp_path / "x")
    for split in ("train", "test"):
        rows = [{"images": [image], "problem": "<image>Find x.", "answer": "3"}] * 2
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    assert prepare(str(tmp_path), tmp_path / "out") == dict.fromkeys(FILES, 2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answer": "D"}, "'answer' 'D' names none of its 'choices'"),
        ({"answer": None}, "'answer' None names none"),
        ({"annotat_text": "", "problem_text": ""}, "has no 'annotat_text'"),
    ],
)
def test_a_wrong_problem_is_named_and_nothing_is_written(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    for number in range(6):
        write(tmp_path / "source", number, **(changes if number == 4 else {}))
    with pytest.raises(DataError, match=rf"4/data\.json:? {reason}"):
        prepare(str(tmp_path / "source"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_diagram_an_empty_folder_and_a_missing_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (write(tmp_path / "source", 1) / "img_diagram.png").unlink()
    with pytest.raises(DataError, match=r"img_diagram\.png does not exist"):
        prepare(str(tmp_path / "source"), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"neither \*/data\.json nor train"):
        prepare(str(tmp_path / "empty"), tmp_path)
    write(tmp_path / "one", 1)
    with pytest.raises(DataError, match="1 problems for training and 0 for tests"):
        prepare(str(tmp_path / "one"), tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="could not be downloaded"):
        prepare("no such/data set/at all", tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"images": [None]}, "row 0: image 1 has no bytes"),
        ({"images": [{"bytes": None, "path": "a.png"}]}, "row 0: image 1 has no bytes"),
        ({"images": {"bytes": b"x", "path": "a.png"}}, "row 0 has no 'images'"),
        ({"problem": "Find x."}, "row 0 has 1 image and 0 places"),
        ({"problem": "<image><image>"}, "row 0 has 1 image and 2 places"),
        ({"problem": ["<image>"]}, "row 0 has no 'problem'"),
        ({"answer": float("nan")}, "row 0 has no 'answer'"),
    ],
)
def test_a_wrong_row_of_the_hubs_layout_is_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    row = {"images": [{"bytes": b"x", "path": "a.png"}], "problem": "<image>Find x.", "answer": 0}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "test.parquet")
    pq.write_table(pa.Table.from_pylist([row | changes]), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=reason):
        prepare(str(tmp_path), tmp_path / "out")
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"train\.parquet"):
        prepare(str(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
