"""Files and folders appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentloop.files import open_atomic, partial_of, rename_folder, write_atomic


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_replaced_whole(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "new" / "a.json"
    write_atomic(path, b"first", durable=durable)
    write_atomic(path, b"second", durable=durable)
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, b"old")
    with pytest.raises(RuntimeError, match="stop"), open_atomic(path) as file:
        file.write(b"half")
        raise RuntimeError("stop")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for text in ("first", "second"):
        partial = partial_of(tmp_path / "out")
        partial.mkdir()
        (partial / text).write_text(text)
        rename_folder(partial, tmp_path / "out")
        assert [file.name for file in (tmp_path / "out").iterdir()] == [text]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
