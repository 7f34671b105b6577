"""The files of a run: written whole, read in parts, and named when something is missing."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from agentloop.errors import DiskError, TraceError
from agentloop.images import open_image
from agentloop.trace.record import TraceRecord
from agentloop.trace.store import CHEAP, SCHEMA, TraceStore
from agentloop.types import EpisodeStatus, Trajectory
from tests.agentloop.trace.store.support import step_records


def group_ids(store: TraceStore, step: int = 3) -> list[str]:
    return [record.trajectory.group_id for record in store.records(step, "train")]


def test_an_empty_store_has_nothing(tmp_path: Path) -> None:
    store = TraceStore(tmp_path / "none")
    assert store.files() == [] and store.steps("train") == [] and store.problems() == []
    assert list(store.scan()) == []
    with pytest.raises(TraceError, match="no train trace of step 3"):
        store.records(3, "train")


def test_one_trajectory_is_found_by_its_key_in_any_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentloop.trace.store.writer.ROW_GROUP_BYTES", 4000)
    store, records = TraceStore(tmp_path), step_records(3, groups=6)
    store.write(3, "train", records)
    assert pq.ParquetFile(store.path(3, "train")).num_row_groups > 2
    for record in records:
        found = store.record(record.key)
        assert found.key == record.key and found.trajectory == record.trajectory
    assert [record.key for record in store.iterate(3, "train")] == [record.key for record in records]
    for key, message in {
        "train/3/g0/9/0": "has no trajectory",
        "train/9/g0/0/0": "steps with a trace: 3",
        "x": "key",
    }.items():
        with pytest.raises(TraceError, match=message) as caught:
            store.record(key)
        assert caught.value.hint


def test_the_trajectories_of_an_episode_stay_together(tmp_path: Path) -> None:
    store = TraceStore(tmp_path)
    forks = [record.trajectory for record in step_records(3, groups=1, samples=3)]
    for trajectory in forks:
        trajectory.sample_index = 1
    others = step_records(3, groups=2, samples=1)
    records = [*others[:1], *(TraceRecord(3, "train", 2, part, 3, t) for part, t in enumerate(forks)), *others[1:]]
    store.write(3, "train", records)
    assert [len(episode) for episode in store.episodes(3, "train")] == [1, 3, 1]
    assert [record.part for record in store.episode("train/3/g0/1/2")] == [0, 1, 2]


def test_scanning_reads_cheap_columns_of_every_file(tmp_path: Path) -> None:
    store = TraceStore(tmp_path)
    for step in (2, 10):
        store.write(step, "train", step_records(step))
    store.write(2, "eval", [])
    found = {(file.step, file.split): table for file, table in store.scan()}
    assert list(found) == [(2, "train"), (2, "eval"), (10, "train")]
    assert [len(table) for table in found.values()] == [8, 0, 8]
    table = found[10, "train"]
    assert tuple(table.column_names) == CHEAP and "token_ids" not in CHEAP
    assert set(table["length"].to_pylist()) == {60} and set(table["sampled"].to_pylist()) == {30}
    assert set(table["min_version"].to_pylist()) == {9} and set(table["max_version"].to_pylist()) == {10}
    ((_, rewards),) = store.scan(("reward",), files=store.files("train")[:1])
    assert rewards["reward"].to_pylist() == [record.trajectory.reward for record in step_records(2)]


# -- which groups are kept


def test_whole_groups_are_kept_within_the_bytes_and_always_the_same(tmp_path: Path) -> None:
    store = TraceStore(tmp_path)
    records = step_records(3, groups=24, samples=4, tokens=600, failed={(0, 1), (7, 2), (20, 0)})
    full = store.write(3, "train", records).size
    written = store.write(3, "train", records, max_bytes=full // 3, seed=5)
    kept = store.records(3, "train")
    assert written.size <= full // 3 and store.path(3, "train").stat().st_size == written.size
    healthy: dict[str, int] = {}
    for record in kept:
        if record.trajectory.status is EpisodeStatus.OK:
            healthy[record.trajectory.group_id] = healthy.get(record.trajectory.group_id, 0) + 1
    every = {"g0": 3, "g7": 3, "g20": 3}
    assert all(count == every.get(group, 4) for group, count in healthy.items()), "whole groups"
    assert 4 <= len(healthy) < 12, "as many as there is room for"
    assert {record.key for record in kept if record.trajectory.error} == {
        "train/3/g0/1/0", "train/3/g7/2/0", "train/3/g20/0/0"
    }  # fmt: skip
    order = [record.key for record in records]
    assert [record.key for record in kept] == sorted((record.key for record in kept), key=order.index)

    metadata = store.metadata(3, "train")
    assert metadata["left_out_groups"] == written.left_out_groups == 24 - len(healthy)
    assert metadata["left_out_episodes"] == written.left_out_episodes == 96 - len(kept)
    store.write(3, "train", records, max_bytes=full // 3, seed=5)
    assert [record.key for record in store.records(3, "train")] == [record.key for record in kept]
    store.write(3, "train", records, max_bytes=full // 3, seed=6)
    assert {*group_ids(store)} != {record.trajectory.group_id for record in kept}


def test_failed_and_rejected_episodes_are_kept_whatever_the_limit(tmp_path: Path) -> None:
    store = TraceStore(tmp_path)
    records = step_records(3, failed={(1, 0), (2, 1)})
    records[6].trajectory.status = EpisodeStatus.REJECTED
    written = store.write(3, "train", records, max_bytes=1)
    assert [record.key for record in store.records(3, "train")] == [records[i].key for i in (2, 5, 6)]
    assert written.left_out_groups == 4 and written.left_out_episodes == 5


def test_groups_that_compress_worse_than_the_first_one_still_stay_within_the_bytes(tmp_path: Path) -> None:
    store = TraceStore(tmp_path)
    records = step_records(3, groups=12, samples=2, tokens=3000)
    for record in records[: len(records) // 2]:
        record.trajectory.token_ids = [7] * 3000
        record.trajectory.logprobs = [None if value is None else -1.0 for value in record.trajectory.logprobs]
    full = store.write(3, "train", records).size
    for seed in range(6):
        assert store.write(3, "train", records, max_bytes=full // 2, seed=seed).size <= full // 2


# -- images


def test_each_image_is_stored_once_and_read_back(tmp_path: Path) -> None:
    from PIL import Image

    red, data = Image.new("RGB", (4, 3), (255, 0, 0)), io.BytesIO()
    Image.new("RGB", (2, 2), (0, 9, 0)).save(data, "JPEG")
    url = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
    given: list[Any] = [red, data.getvalue(), {"bytes": data.getvalue()}, url]
    content = [{"type": "text", "text": "?"}, *({"type": "image", "image": image} for image in given)]
    content.append({"type": "image_url", "image_url": {"path": str(tmp_path / "lost.png")}})
    records = step_records(3, groups=1)
    for record in records:
        record.trajectory.images = [*given]
        record.trajectory.messages = [{"role": "user", "content": content}]
    store = TraceStore(tmp_path / "run")
    store.write(3, "train", records)

    jpeg = hashlib.sha256(data.getvalue()).hexdigest()
    assert len(list(store.images.folder.iterdir())) == 2
    path = store.images.find(jpeg)
    assert path is not None and path.name == f"{jpeg}.jpg" and path.read_bytes() == data.getvalue()
    for record in store.records(3, "train"):
        first, *others = record.trajectory.images
        assert np.array_equal(np.asarray(open_image(first)), np.asarray(red))
        assert [image["sha256"] for image in others] == [jpeg] * 3
        parts = record.trajectory.messages[0]["content"]
        assert isinstance(parts, list) and parts[0] == content[0] and parts[2]["image"]["path"] == str(path)
        assert parts[5] == {"type": "image_url", "image_url": {"sha256": "unreadable"}}
    assert store.images.find("../../x") is None and store.images.find("0" * 64) is None
    again = store.records(3, "train")
    TraceStore(tmp_path / "copy").write(3, "train", again)  # digests are kept, files stay where they are
    assert json.dumps([image["sha256"] for image in again[0].trajectory.images])


# -- damage


def test_cut_and_lost_files_are_named(tmp_path: Path) -> None:
    store = TraceStore(tmp_path)
    for step in (1, 2, 3, 4):
        store.write(step, "train", step_records(step))
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "resolved.json").write_text('{"trace": {"train_every": 1}}')
    rows = [{"step": step, "reward/mean": 0.5} for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6, "rew')
    assert [problem.path.parent.name for problem in store.problems()] == ["step_5"]
    path = store.path(2, "train")
    path.write_bytes(path.read_bytes()[:-100])
    store.path(3, "train").unlink()
    (tmp_path / "traces" / "step_5").mkdir()
    (tmp_path / "traces" / "step_5" / "train.parquet.tmp").write_bytes(b"PAR1")
    said = [str(problem) for problem in store.problems()]
    assert len(said) == 3 and all("(" in text for text in said)
    assert "step_2/train.parquet is cut or damaged" in said[0]
    assert "step_5/train.parquet.tmp is not complete" in said[1] and "--resume" in said[1]
    assert "step_3/train.parquet is missing, although the step was trained" in said[2]
    assert [file.step for file, _ in store.scan()] == [1, 4]
    with pytest.raises(TraceError, match=r"step_2/train\.parquet is cut"):
        store.records(2, "train")
    with pytest.raises(TraceError, match=r"step_2/train\.parquet is cut"):
        store.record("train/2/g0/0/0")


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa

    store = TraceStore(tmp_path)
    store.path(1, "train").parent.mkdir(parents=True)
    pq.write_table(pa.table({"a": [1]}), store.path(1, "train"))
    with pytest.raises(TraceError, match="has format None, which is not 1"):
        store.records(1, "train")
    assert len(store.problems()) == 1
    wrong = SCHEMA.with_metadata({b"agentloop": b'{"format": 1}'}).remove(0)
    pq.write_table(wrong.empty_table(), store.path(1, "train"))
    with pytest.raises(TraceError, match="has no column step"):
        store.records(1, "train")


def test_rewinding_forgets_later_steps_and_what_a_killed_write_left(tmp_path: Path) -> None:
    store = TraceStore(tmp_path)
    for step in (1, 2, 3):
        store.write(step, "train", step_records(step))
    left = store.path(2, "eval").with_name("eval.parquet.tmp")
    left.write_bytes(b"PAR1 and then")
    store.images.keep("0" * 64, b"\x89PNG")
    (store.images.folder / ("1" * 64 + ".png.tmp")).write_bytes(b"")
    store.rewind(2)
    assert store.steps("train") == [1, 2] and not left.exists()
    assert [path.name for path in store.images.folder.iterdir()] == ["0" * 64 + ".png"]


def test_a_full_disk_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TraceStore(tmp_path)
    store.write(1, "train", step_records(1, groups=1))
    before = store.path(1, "train").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(DiskError, match="No space left"):
        store.write(1, "train", step_records(1))
    assert [path.name for path in store.path(1, "train").parent.iterdir()] == ["train.parquet"]
    assert store.path(1, "train").read_bytes() == before


# -- other tools


DOCUMENTATION = (Path(__file__).parents[4] / "docs" / "traces.md").read_text(encoding="utf-8")
SNIPPETS = [
    text for text in re.findall(r"```python\n(.*?)```", DOCUMENTATION, re.DOTALL) if "outputs/run/traces" in text
]


@pytest.mark.parametrize("tool", ["pandas", "duckdb", "polars"])
def test_common_tools_read_a_trace_without_our_code(
    tmp_path: Path, tool: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    records = step_records(12)
    for step in (11, 12):
        TraceStore(Path("outputs/run")).write(step, "train", step_records(step))
    (code,) = [text for text in SNIPPETS if f"import {tool}\n" in text]
    assert "agentloop" not in code
    subprocess.run([sys.executable, "-c", code], check=True)
    shown = capfd.readouterr().out
    rewards = [record.trajectory.reward for record in records if record.trajectory.task_id == "row-g2"]
    wanted = {"pandas": f"row-g2    {sum(rewards) / 2:.1f}", "duckdb": "ok", "polars": str(8 * 60)}  # type: ignore[arg-type]
    assert wanted[tool] in shown


def test_the_columns_are_those_of_the_documentation() -> None:
    table = DOCUMENTATION.split("| column |")[1].split("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert named == set(SCHEMA.names)


def test_a_record_of_another_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train/3/g0/0/0 is not a record of train/4"):
        TraceStore(tmp_path).write(4, "train", step_records(3))
    assert not TraceStore(tmp_path).files()


def test_numbers_of_the_wrong_kind_do_not_stop_a_write(tmp_path: Path) -> None:
    odd: Any = Trajectory([1], [1], [-1.0], [0], 0, reward=np.float64(0.5), metrics={"n": np.int64(3), 4: "x"})  # type: ignore[dict-item]
    odd.task_id = 17
    store = TraceStore(tmp_path)
    store.write(1, "train", [TraceRecord(1, "train", 0, 0, 1, odd)])
    (read,) = store.records(1, "train")
    assert read.trajectory.reward == 0.5 and read.trajectory.task_id == 17
    assert read.trajectory.metrics == {"n": 3, "4": "x"}
