"""Files and folders appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agentloop.errors import DiskError
from agentloop.files import (
    append_line,
    disk_error,
    disk_errors,
    open_atomic,
    partial_of,
    read_json,
    rename_folder,
    write_atomic,
)


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


def test_a_full_disk_is_an_error_with_file_and_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=r"a\.json could not be written: No space left (?s:.*) MB free(?s:.*)fix:"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_another_error_of_a_file_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), disk_errors(tmp_path):
        (tmp_path / "missing").read_bytes()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO])
def test_each_fault_of_a_disk_is_told_with_the_file_that_python_names(tmp_path: Path, number: int) -> None:
    error = disk_error(OSError(number, os.strerror(number), str(tmp_path / "log")))
    assert error is not None and str(tmp_path / "log") in error.message and os.strerror(number) in error.message
    assert disk_error(OSError(number, os.strerror(number))) is not None


def test_a_line_that_does_not_fit_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    """In a process of its own: a limit of its file sizes stands for the full disk, which takes half of the line."""
    path = tmp_path / "metrics.jsonl"
    append_line(path, b'{"step": 1}')
    program = """
import resource, sys
from pathlib import Path
from agentloop.errors import DiskError
from agentloop.files import append_line
resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
try:
    append_line(Path(sys.argv[1]), b'{"step": 2}' * 10)
except DiskError as exc:
    print(exc.message)
"""
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert "metrics.jsonl could not be written: File too large" in done.stdout
    assert path.read_bytes() == b'{"step": 1}\n'


def test_writers_of_one_file_do_not_share_a_temporary_name(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with open_atomic(path) as first:
        first.write(b"first")
        with open_atomic(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("near", [10**18, 10**19, 2**63, 2**64, 10**20, 10**30])
def test_integers_of_json_are_exact_however_large(near: int, sign: int) -> None:
    numbers = [sign * near + number for number in (-1, 0, 1)]
    found = read_json(json.dumps({"numbers": numbers}).encode())
    assert found == {"numbers": numbers} and all(type(number) is int for number in found["numbers"])
