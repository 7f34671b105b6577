"""A weights file that is read while it is written."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from agentloop.weights.layout import TensorSpec, plan_file
from agentloop.weights.shared import PROGRESS_BYTES, Progress, SharedReader, SharedWriter, StalledError, await_shared

SHAPES = [("big", "float32", (PROGRESS_BYTES // 2,)), ("small", "float32", (10,))]


def fill(writer: SharedWriter, value: int, wait: threading.Event | None = None) -> list[TensorSpec]:
    """Write every byte of every tensor as `value`; with `wait`, stop in the middle of the first until it is set."""
    header, specs = plan_file(SHAPES)
    writer.open(header, specs[-1].end)
    for spec in specs:
        if wait is not None and spec is specs[0]:
            writer.data[spec.begin : spec.begin + PROGRESS_BYTES] = value
            writer.progress.reach(spec.begin + PROGRESS_BYTES)
            assert wait.wait(10)
        writer.data[spec.begin : spec.end] = value
        writer.progress.reach(spec.end)
    writer.progress.finish(f"xxh3:{value}")
    return specs


def test_a_reader_gets_each_piece_when_it_is_complete(tmp_path: Path) -> None:
    writer, go_on = SharedWriter(tmp_path), threading.Event()
    writer.progress.begin("1")
    thread = threading.Thread(target=fill, args=(writer, 7, go_on))
    thread.start()
    reader = SharedReader(tmp_path)
    pieces = reader.follow("1", 10)
    spec, piece = next(pieces)
    assert (spec.name, len(piece), set(piece[::1000])) == ("big", PROGRESS_BYTES, {7})
    assert not go_on.is_set() and not writer.data[spec.begin + PROGRESS_BYTES : spec.end].any()
    go_on.set()
    rest = list(pieces)
    thread.join()
    assert [(spec.name, len(piece)) for spec, piece in rest] == [("big", PROGRESS_BYTES), ("small", 40)]
    assert all((piece == 7).all() for _, piece in rest)
    assert reader.checksum() == "xxh3:7"


def test_what_the_writer_has_left_behind_comes_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentloop.weights.shared.BEHIND", 100)
    header, specs = plan_file([(name, "uint8", (80,)) for name in "abcd"])
    writer = SharedWriter(tmp_path)
    writer.progress.begin("1")
    writer.open(header, specs[-1].end)
    for value, spec in enumerate(specs, 1):
        writer.data[spec.begin : spec.end] = value
    writer.progress.reach(specs[2].end)
    pieces = SharedReader(tmp_path).follow("1", 10)
    first = next(pieces)
    writer.progress.reach(specs[-1].end)
    writer.progress.finish("xxh3:1")
    read = [(spec.name, set(piece)) for spec, piece in [first, *pieces]]
    assert read == [("c", {3}), ("d", {4}), ("a", {1}), ("b", {2})]


def test_a_writer_can_wait_for_the_first_reader(tmp_path: Path) -> None:
    writer, reader = SharedWriter(tmp_path), SharedReader(tmp_path)
    for version, read in (("1", lambda: list(reader.follow("1", 10))), ("2", lambda: await_shared(tmp_path, "2", 10))):
        writer.progress.begin(version)
        assert not writer.progress.wait_for_reader(0.01)
        header, specs = plan_file(SHAPES)
        writer.open(header, specs[-1].end)
        thread = threading.Thread(target=read)
        thread.start()
        assert writer.progress.wait_for_reader(10)
        fill(writer, 1)
        thread.join()


def test_a_reader_waits_for_its_version(tmp_path: Path) -> None:
    writer = SharedWriter(tmp_path)
    writer.progress.begin("1")
    fill(writer, 1)
    reader = SharedReader(tmp_path)
    assert all((piece == 1).all() for _, piece in reader.follow("1", 1))
    with pytest.raises(StalledError, match="holds version 1"):
        list(reader.follow("3", 0.05))
    got: list[np.ndarray] = []
    thread = threading.Thread(target=lambda: got.extend(piece.copy() for _, piece in reader.follow("3", 10)))
    thread.start()
    writer.progress.begin("3")
    fill(writer, 3)
    thread.join()
    assert len(got) == 3 and all((piece == 3).all() for piece in got)


def test_the_next_version_takes_the_place_of_the_last_but_one(tmp_path: Path) -> None:
    writer, reader = SharedWriter(tmp_path), SharedReader(tmp_path)
    writer.progress.begin("1")
    fill(writer, 1)
    list(reader.follow("1", 1))
    inode, mapped = (tmp_path / "model.safetensors").stat().st_ino, reader.data
    writer.progress.begin("3")
    fill(writer, 3)
    list(reader.follow("3", 1))
    assert (tmp_path / "model.safetensors").stat().st_ino == inode
    assert reader.data is mapped


def test_what_a_reader_does_to_its_tensors_stays_with_it(tmp_path: Path) -> None:
    writer, reader = SharedWriter(tmp_path), SharedReader(tmp_path)
    writer.progress.begin("1")
    specs = fill(writer, 1)
    list(reader.follow("1", 1))
    reader.data[specs[0].begin] = 99
    assert writer.data[specs[0].begin] == 1


def test_a_writer_that_gives_up_or_stands_still_is_an_error(tmp_path: Path) -> None:
    writer = SharedWriter(tmp_path)
    writer.progress.begin("1")
    with pytest.raises(StalledError, match="made no progress"):
        list(SharedReader(tmp_path).follow("1", 0.05))
    writer.progress.fail()
    with pytest.raises(StalledError, match="abandoned version"):
        list(SharedReader(tmp_path).follow("1", 10))
    with pytest.raises(StalledError, match="abandoned version"):
        await_shared(tmp_path, "1", 10)


def test_a_folder_without_a_record_is_complete(tmp_path: Path) -> None:
    writer = SharedWriter(tmp_path)
    fill(writer, 5)
    (tmp_path / "progress").unlink()
    reader = SharedReader(tmp_path)
    assert all((piece == 5).all() for _, piece in reader.follow("any", 0.1))
    assert reader.checksum() is None
    await_shared(tmp_path, "any", 0.1)


def test_a_model_of_another_size_is_another_file(tmp_path: Path) -> None:
    writer = SharedWriter(tmp_path)
    fill(writer, 5)
    inode = (tmp_path / "model.safetensors").stat().st_ino
    kept = writer.data
    writer.open(*((found := plan_file([("x", "float32", (3,))]))[0], found[1][-1].end))
    assert (tmp_path / "model.safetensors").stat().st_ino != inode
    assert (kept[-40:] == 5).all()


def test_a_record_holds_a_long_version(tmp_path: Path) -> None:
    progress = Progress(tmp_path, create=True)
    progress.begin("v" * 64)
    progress.finish("xxh3:0123456789abcdef")
    assert Progress(tmp_path).read()[1:] == ("v" * 64, "xxh3:0123456789abcdef")
