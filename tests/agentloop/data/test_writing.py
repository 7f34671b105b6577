"""Files of rows are written all or none, and none without rows."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentloop.data import open_rows, write_rows
from agentloop.errors import ConfigError, DataError, DiskError

ROWS = [{"prompt": [{"role": "user", "content": "ü and 😀"}]}]
OTHERS = [{"prompt": "a"}, {"prompt": "b"}]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    files = {"train.parquet": ROWS, "sft.jsonl": OTHERS}
    assert write_rows(tmp_path / "new" / "folder", files) == {"train.parquet": 1, "sft.jsonl": 2}
    for name, rows in files.items():
        assert list(open_rows([str(tmp_path / "new" / "folder" / name)], "data.train")) == rows


def test_integers_of_any_size_stay_exact_in_jsonl(tmp_path: Path) -> None:
    write_rows(tmp_path, {"rows.jsonl": [{"answer": 10**30 + 5}]})
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == {"answer": 10**30 + 5}


FAILING: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"train.parquet": OTHERS, "test.parquet": []}, DataError, "the source has no rows for test.parquet"),
    ({"train.jsonl": OTHERS, "test.csv": OTHERS}, ConfigError, "cannot be written to test.csv"),
    ({"train.jsonl": OTHERS, "test.parquet": [{"a": 1}, {"a": "x"}]}, DataError, "rows of test.parquet do not fit"),
    ({"train.jsonl": OTHERS, "test.parquet": [{"a": 10**30}]}, DataError, "rows of test.parquet do not fit"),
]


@pytest.mark.parametrize(("files", "error", "message"), FAILING)
def test_a_file_that_cannot_be_written_leaves_all_as_it_was(
    tmp_path: Path, files: dict[str, Any], error: type[Exception], message: str
) -> None:
    (tmp_path / "train.jsonl").write_text("old")
    (tmp_path / "train.parquet").write_text("old")
    with pytest.raises(error, match=message):
        write_rows(tmp_path, files)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "train.jsonl": "old",
        "train.parquet": "old",
    }


def test_a_full_disk_is_named_and_leaves_all_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("old")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=r"b\.jsonl|a\.jsonl"):
        write_rows(tmp_path, {"a.jsonl": OTHERS, "b.jsonl": OTHERS})
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.jsonl", "old")]


def test_what_a_killed_preparation_left_is_removed(tmp_path: Path) -> None:
    program = (
        "import os, sys, pathlib\n"
        "from agentloop.files import open_atomic\n"
        "with open_atomic(pathlib.Path(sys.argv[1]) / 'train.jsonl') as file:\n"
        "    file.write(b'half')\n"
        "    file.flush()\n"
        "    os._exit(1)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    write_rows(tmp_path, {"train.jsonl": OTHERS})
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]
