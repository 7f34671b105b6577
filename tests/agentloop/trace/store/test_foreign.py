"""Traces of others: damaged rows are named, and no file of this machine is read for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agentloop.errors import TraceError
from agentloop.trace.exporting import is_trace_id
from agentloop.trace.index import TraceIndex
from agentloop.trace.signals import signals_of
from agentloop.trace.store import TraceStore
from agentloop.trace.store.files import step_folders
from agentloop.trace.store.old_form import convert, old_files
from tests.agentloop.trace.store.support import step_records


def change(path: Path, column: str, value: Any) -> None:
    """Replace a column of a trace file by one value."""
    table = pq.read_table(path)
    place = table.schema.get_field_index(column)
    field = table.schema.field(column)
    pq.write_table(table.set_column(place, field, pa.array([value] * len(table), field.type)), path)


BAD: dict[str, tuple[str, Any]] = {
    "turns": ("turns", "5"),
    "cut": ("turns", "[{"),
    "messages": ("messages", "[5]"),
    "other": ("other", "[1]"),
    "spans": ("sampled_spans", [{"start": 5, "end": 2_000_000_000, "version": 1}]),
    "step": ("step", None),
    "version": ("version", None),
}


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    store = TraceStore(tmp_path)
    for step in (1, 2):
        store.write(step, "train", step_records(step))
    change(store.path(1, "train"), *BAD[name])
    with pytest.raises(TraceError, match="holds a row that cannot be read"):
        store.records(1, "train")
    with pytest.raises(TraceError, match="holds a row that cannot be read"):
        store.record("train/1/g0/0/0")
    assert len(store.records(2, "train")) == 8
    signals_of(tmp_path)


@pytest.mark.parametrize("column", ["step", "version"])
def test_a_bad_file_has_a_problem_in_the_index_and_the_others_are_indexed(tmp_path: Path, column: str) -> None:
    store = TraceStore(tmp_path)
    for step in (1, 2):
        store.write(step, "train", step_records(step))
    change(store.path(1, "train"), column, None)
    (tmp_path / "traces" / "step_3").mkdir()
    (tmp_path / "traces" / "step_3" / "train.jsonl").write_text(json.dumps(old_line(messages="x")) + "\n")
    (tmp_path / "traces" / ("step_" + "9" * 23)).mkdir()
    assert list(step_folders(store.folder)) == [1, 2, 3]
    index = TraceIndex(tmp_path)
    index.refresh()
    assert index.query().total == 8
    assert [problem["file"] for problem in index.problems()] == ["step_1/train.parquet"]
    assert column in index.problems()[0]["problem"]
    assert index.around(f"train/2/g0/{'9' * 40}/0", *_any())["index"] == -1
    index.close()


def _any() -> Any:
    from agentloop.trace.index import EpisodeFilter, Sort

    return EpisodeFilter(), Sort()


def old_line(**changed: Any) -> dict[str, Any]:
    return json.loads(json.dumps(step_records(3)[0].trajectory.to_json(), default=str)) | changed


def test_an_import_counts_lines_that_hold_no_trajectory(tmp_path: Path) -> None:
    folder = tmp_path / "traces" / "step_3"
    folder.mkdir(parents=True)
    lines = [old_line(), old_line(messages="x", sample_index=1), old_line(turns=5), old_line(metrics="y", spans=[1])]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    store = TraceStore(tmp_path)
    (file,) = old_files(store.folder)
    done = convert(store, file)
    assert (done.trajectories, done.lost) == (1, 3)
    assert store.records(3, "train")[0].trajectory.messages[0]["content"] == "Question?"


def image_messages(path: Path) -> list[dict[str, Any]]:
    parts = [
        {"type": "image", "image": str(path)},
        {"type": "image", "image": {"path": str(path)}},
        {"type": "image_url", "image_url": {"url": f"file://{path}"}},
        {"type": "image", "image": {"sha256": "0" * 64, "path": str(path)}},
        {"type": "image", "image": "data:image/png;base64,AAAA"},
    ]
    return [{"role": "user", "content": parts}]


def test_the_traces_of_others_read_no_file_of_this_machine(tmp_path: Path) -> None:
    from PIL import Image

    secret = tmp_path / "x.png"
    Image.new("RGB", (4, 4), "red").save(secret)
    run = tmp_path / "run"
    store = TraceStore(run)
    store.write(1, "train", step_records(1))
    change(store.path(1, "train"), "messages", json.dumps(image_messages(secret)))
    change(store.path(1, "train"), "other", json.dumps({"images": [str(secret)]}))
    folder = run / "traces" / "step_3"
    folder.mkdir()
    line = old_line(messages=image_messages(secret), images=[str(secret)])
    (folder / "train.jsonl").write_text(json.dumps(line) + "\n")
    convert(store, old_files(store.folder)[0])
    for step in (1, 3):
        for record in store.records(step, "train"):
            assert str(secret) not in repr(record.trajectory)
    first = store.records(1, "train")[0].trajectory
    shown = [part.get("image", part.get("image_url")) for part in first.messages[0]["content"]]
    assert shown == [*[{"sha256": "unreadable"}] * 3, {"sha256": "0" * 64}, "data:image/png;base64,AAAA"]
    assert first.images == []
    assert [path.stat().st_size for path in store.images.folder.iterdir()] == [3], "only the data URL"


def test_a_part_beyond_64_bits_is_not_found(tmp_path: Path) -> None:
    store = TraceStore(tmp_path)
    store.write(1, "train", step_records(1))
    with pytest.raises(TraceError, match="has no trajectory"):
        store.record(f"train/1/g0/0/{'9' * 30}")


def test_a_trace_id_is_32_hexadecimal_digits() -> None:
    assert is_trace_id("0" * 31 + "1")
    assert not any(map(is_trace_id, ("", "x" * 32, "0" * 32, "1" * 31, None, 5)))
