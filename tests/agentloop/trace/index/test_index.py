"""The index is a cache: what it answers is in the trace files, whatever happens to it."""

from __future__ import annotations

import shutil
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from agentloop.errors import TraceError
from agentloop.trace.index import EpisodeFilter, Sort, TraceIndex
from agentloop.trace.index.database import NAME
from agentloop.trace.record import TraceRecord
from agentloop.trace.store import TraceStore
from agentloop.types import EpisodeStatus
from tests.agentloop.trace.store.support import step_records


def write(run: Path, step: int, **made: Any) -> None:
    TraceStore(run).write(step, "train", step_records(step, **made))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2):
        write(tmp_path, step, failed={(3, 1)})
    return tmp_path


def keys(index: TraceIndex, wanted: EpisodeFilter | None = None) -> list[str]:
    return [row["key"] for row in index.query(wanted, Sort("step", False), limit=500).rows]


def stored(run: Path) -> list[str]:
    store = TraceStore(run)
    return [record.key for step in store.steps("train") for record in store.records(step, "train")]


def search(words: str) -> EpisodeFilter:
    return EpisodeFilter(search=words)


def test_every_episode_is_found_by_its_columns_and_its_words(run: Path) -> None:
    index = TraceIndex(run)
    assert index.refresh()
    assert keys(index) == stored(run)
    assert not index.refresh()
    failed = index.query(EpisodeFilter(choices=(("status", ("failed",)),)))
    assert [row["key"] for row in failed.rows] == ["train/2/g3/1/0", "train/1/g3/1/0"]
    assert index.query(search("error:lost")).total == 2
    assert index.query(EpisodeFilter(ranges=(("step", 2, None),))).total == 8
    assert index.bounds()["splits"]["train"] == {"episodes": 16, "first_step": 1, "last_step": 2, "steps": 2}


def test_only_new_files_are_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentloop.trace.index import index as module

    read: list[str] = []
    real = module.read_rows

    def watched(store: TraceStore, file: Any) -> Any:
        read.append(f"{file.step}/{file.split}")
        return real(store, file)

    monkeypatch.setattr(module, "read_rows", watched)
    TraceIndex(run).refresh()
    write(run, 3)
    TraceIndex(run).refresh()
    TraceIndex(run).refresh()
    assert read == ["1/train", "2/train", "3/train"]


def test_a_rewound_run_is_forgotten_and_written_again(run: Path) -> None:
    index = TraceIndex(run)
    index.refresh()
    before = index.generation
    TraceStore(run).rewind(1)
    assert index.refresh()
    assert index.generation > before
    assert keys(index) == stored(run) == [key for key in stored(run) if key.startswith("train/1/")]
    write(run, 2, samples=1)
    index.refresh()
    assert keys(index) == stored(run)
    # The words of the removed step are still in the full-text table; they find nothing.
    assert index.query(search("question")).total == 12
    assert sum(index.facets(search("question"))["status"].values()) == 12


def test_a_run_adds_the_step_that_it_wrote(run: Path) -> None:
    index = TraceIndex(run, temporary=False)
    index.add(2, "train")
    assert keys(index) == [key for key in stored(run) if key.startswith("train/2/")]
    index.add(2, "train")
    index.add(9, "train")  # was left out
    index.refresh()
    assert sorted(keys(index)) == sorted(stored(run))


@pytest.mark.parametrize("damage", ["text", "cut", "version", "tables", "missing"])
def test_a_damaged_index_is_rebuilt(run: Path, damage: str) -> None:
    made = TraceIndex(run)
    made.refresh()
    made.close()
    path = run / "traces" / NAME
    if damage == "text":
        path.write_bytes(b"not a database" * 1000)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "missing":
        path.unlink()
    else:
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA user_version = 99" if damage == "version" else "DROP TABLE episodes")
        connection.close()
    index = TraceIndex(run)
    index.refresh()
    assert keys(index) == stored(run)
    assert index.query(search("question")).total == 16


def test_an_index_that_another_process_rebuilt_is_opened_again(run: Path) -> None:
    index = TraceIndex(run)
    index.refresh()
    for name in (NAME, f"{NAME}-wal", f"{NAME}-shm"):
        (run / "traces" / name).unlink(missing_ok=True)
    write(run, 3)
    TraceIndex(run).refresh()
    assert keys(index) == stored(run)


def test_where_nothing_can_be_written_a_temporary_file_serves(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "traces" / NAME).mkdir()
    with pytest.raises(TraceError, match="cannot be used"):
        TraceIndex(run, temporary=False).refresh()
    index = TraceIndex(run)
    index.refresh()
    assert keys(index) == stored(run)
    folder = Path(index._folder.name)  # type: ignore[union-attr]
    index.close()
    assert not folder.exists()


def test_an_index_that_can_only_be_read_is_copied(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentloop.trace.index import database
    from agentloop.trace.index import index as module

    TraceIndex(run).refresh()
    real = database.Database

    def read_only(path: Path) -> Any:
        if path.parent == run / "traces":
            raise database.Unavailable("attempt to write a readonly database")
        return real(path)

    monkeypatch.setattr(module, "Database", read_only)
    index = TraceIndex(run)
    assert keys(index) == stored(run)  # without refresh: it came with the copy
    write(run, 3)
    index.refresh()
    assert keys(index) == stored(run)


def test_a_run_without_traces_has_no_episodes_until_it_writes_some(tmp_path: Path) -> None:
    index = TraceIndex(tmp_path / "run")
    assert not index.refresh()
    assert index.query().total == 0
    assert not (tmp_path / "run").exists()
    write(tmp_path / "run", 1)
    index.refresh()
    assert keys(index) == stored(tmp_path / "run")
    assert (tmp_path / "run" / "traces" / NAME).is_file()


def test_a_file_that_cannot_be_read_is_named_until_it_is_whole(run: Path) -> None:
    path = run / "traces" / "step_2" / "train.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    index = TraceIndex(run)
    index.refresh()
    assert [problem["file"] for problem in index.problems()] == ["step_2/train.parquet"]
    assert index.query().total == 8
    assert not index.refresh()
    path.write_bytes(whole)
    index.refresh()
    assert (index.problems(), index.query().total) == ([], 16)


def test_several_writers_and_readers_at_once(run: Path) -> None:
    for step in range(3, 9):
        write(run, step)
    expected, seen, errors = sorted(stored(run)), [], []

    def work() -> None:
        try:
            index = TraceIndex(run)
            for _ in range(3):
                index.refresh()
                page = index.query(search("question"), Sort("reward"), limit=500)
                assert page.total >= len(page.rows)
            seen.append(sorted(keys(index)))
        except Exception as exc:
            errors.append(exc)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert seen == [expected] * 4


def test_a_write_that_is_interrupted_leaves_the_index_as_it_was(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentloop.trace.index import index as module

    real = module.read_rows

    def torn(store: TraceStore, file: Any) -> Any:
        for number, row in enumerate(real(store, file)):
            if file.step == 2 and number == 3:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(module, "read_rows", torn)
    with pytest.raises(KeyboardInterrupt):
        TraceIndex(run).refresh()
    monkeypatch.undo()
    index = TraceIndex(run)
    assert keys(index) == [key for key in stored(run) if key.startswith("train/1/")]
    index.refresh()
    assert keys(index) == stored(run)


def test_traces_of_earlier_versions_are_indexed(tmp_path: Path) -> None:
    from agentloop.files import json_line

    records = step_records(1)
    folder = tmp_path / "traces" / "step_1"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_bytes(b"".join(json_line(one.trajectory.to_json()) for one in records))
    index = TraceIndex(tmp_path)
    index.refresh()
    assert index.query(search("question")).total == len(records)
    shutil.rmtree(folder)
    index.refresh()
    assert index.query().total == 0


def test_odd_values_do_not_fail_the_index(tmp_path: Path) -> None:
    made = step_records(1, groups=1, samples=2)
    odd = made[0].trajectory
    odd.group_id, odd.task_id, odd.answer = "g/\ud800\0", "\udfff", "a\ud800b"
    odd.status, odd.error = EpisodeStatus.REJECTED, None
    odd.reward, odd.metrics = float("nan"), {"generate_s": float("inf")}
    odd.messages = [{"role": "user", "content": [{"type": "text", "text": "part"}, {"type": "image"}]}, {}]  # type: ignore[typeddict-item]
    odd.sample_index = 2**70
    TraceStore(tmp_path).write(1, "train", made)
    index = TraceIndex(tmp_path)
    index.refresh()
    assert index.problems() == []
    row = index.query(search("part")).rows[0]
    assert (row["reward"], row["cause"], row["answer"]) == (None, "no reason recorded", "a?b")
    assert index.failures()[0].count == 1


def test_failures_that_differ_in_numbers_are_one_cause(tmp_path: Path) -> None:
    records: list[TraceRecord] = step_records(1, failed={(0, 0), (1, 0), (2, 1)})
    for number, one in enumerate(record for record in records if record.trajectory.error):
        one.trajectory.error = f"port {number} refused\nlong traceback {number}"
    TraceStore(tmp_path).write(1, "train", records)
    index = TraceIndex(tmp_path)
    index.refresh()
    (cause,) = index.failures()
    assert (cause.cause, cause.count, cause.tasks, len(cause.keys)) == ("port # refused", 3, 3, 3)
    assert cause.error == "port 0 refused long traceback 0"


def test_the_tables_of_another_version_that_refuse_rows_are_rebuilt(run: Path) -> None:
    index = TraceIndex(run)
    index.refresh()
    index.close()
    with sqlite3.connect(run / "traces" / NAME) as connection:
        connection.execute(
            "ALTER TABLE texts ADD COLUMN later TEXT NOT NULL DEFAULT 'x' CHECK (later != 'x' OR id < 17)"
        )
    connection.close()
    write(run, 3)
    again = TraceIndex(run)
    again.refresh()
    assert again.query().total == 24 and again.problems() == []
    again.close()
