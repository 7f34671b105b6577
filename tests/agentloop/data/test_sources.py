"""Sources of rows: every spelling opens the same rows, and a source that cannot be opened is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agentloop.data import load_tasks, open_rows
from agentloop.data.sources import JsonlRows
from agentloop.errors import ConfigError, DataError
from agentloop.imports import load_from_file

ROWS: list[dict[str, Any]] = [{"prompt": [{"role": "user", "content": f"row {i}"}]} for i in range(7)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return str(path)


def contents(source: str | list[str], **options: Any) -> list[str]:
    return [task.prompt[0]["content"] for task in load_tasks(source, "data.train", "d", options)]  # type: ignore[misc]


WANTED = [f"row {i}" for i in range(7)]


def test_files_lists_globs_and_folders_give_the_rows_in_order(tmp_path: Path) -> None:
    one = write_parquet(tmp_path / "rows" / "part-0.parquet", ROWS[:3], row_group_size=2)
    two = write_parquet(tmp_path / "rows" / "part-1.parquet", ROWS[3:])
    lines = write_jsonl(tmp_path / "lines.jsonl", ROWS)
    for source in ([one, two], str(tmp_path / "rows" / "*.parquet"), str(tmp_path / "rows"), lines):
        assert contents(source) == WANTED
    tasks = load_tasks([one, two], "data.train", "d")
    assert [tasks[i].prompt[0]["content"] for i in range(7)] == WANTED
    assert tasks.where(3) == f"{two}, row 0"


def test_blank_lines_are_no_rows_and_count_as_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\n{"prompt": 1}\n  \r\n{"prompt": 2}\r\n\n{"prompt": 3}')
    rows = open_rows(str(file), "data.train")
    assert [row["prompt"] for row in rows] == [1, 2, 3] == [rows[i]["prompt"] for i in range(3)]
    assert [rows.where(i) for i in range(3)] == [f"{file}, row {i} (line {2 * i + 2})" for i in range(3)]


def test_lines_are_found_across_the_blocks_of_a_scan(tmp_path: Path) -> None:
    assert list(JsonlRows(Path(write_jsonl(tmp_path / "a.jsonl", ROWS)), scan_bytes=5)) == ROWS


def test_parquet_beyond_the_budget_is_mapped_and_leaves_no_file(tmp_path: Path) -> None:
    rows = [{**row, "images": [{"bytes": b"png" * 50, "path": None}]} for row in ROWS] * 400
    file = write_parquet(tmp_path / "a.parquet", rows)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    before = pa.total_allocated_bytes()
    opened = open_rows(file, "data.train", in_memory=0, scratch=scratch)
    assert pa.total_allocated_bytes() == before
    assert list(opened) == rows and opened[2500] == rows[2500]
    assert not list(scratch.iterdir())


def test_rows_can_come_from_functions_generators_and_classes(tmp_path: Path) -> None:
    (tmp_path / "rows.py").write_text(
        f"ROWS = {ROWS!r}\n"
        "def make(count=7):\n    return ROWS[:count]\n"
        "def stream():\n    yield from ROWS\n"
        "class Rows:\n"
        "    asked = []\n"
        "    def __init__(self, count=7):\n        self.count = count\n"
        "    def __len__(self):\n        return self.count\n"
        "    def __getitem__(self, index):\n        self.asked.append(index)\n        return ROWS[index]\n"
        "def broken():\n    raise KeyError('column')\n"
        "class Lame(Rows):\n"
        "    def __getitem__(self, index):\n        raise OSError('disk gone')\n"
        "def number():\n    return 3\n"
    )
    module = f"{tmp_path / 'rows.py'}"
    for name in ("make", "stream", "Rows", "ROWS"):
        assert contents(f"{module}:{name}") == WANTED
    assert contents(f"{module}:make", count=2) == WANTED[:2]
    tasks = load_tasks(f"{module}:Rows", "data.train", "d", {"count": 5})
    asked = load_from_file(f"{module}:Rows", "data.train").asked
    asked.clear()
    assert tasks[4].prompt[0]["content"] == "row 4" and asked == [4], "a row is asked for when it is needed"
    with pytest.raises(ConfigError, match="does not define 'other'"):
        open_rows(f"{module}:other", "data.train")
    with pytest.raises(DataError, match=r"data\.train: .*:broken raised KeyError: 'column'\n  fix: correct .*py:\d+"):
        open_rows(f"{module}:broken", "data.train")
    with pytest.raises(DataError, match=r":make raised TypeError: .*'wrong'"):
        open_rows(f"{module}:make", "data.train", {"wrong": 1})
    with pytest.raises(DataError, match=r":Lame, row 2 raised OSError: disk gone"):
        load_tasks(f"{module}:Lame", "data.train", "d")[2]
    with pytest.raises(DataError, match="returned int, which has no rows"):
        open_rows(f"{module}:number", "data.train")


def test_a_registered_data_set_is_named_without_a_path(install: Any) -> None:
    source = (
        "class Rows:\n"
        "    def __init__(self, count):\n        self.count = count\n"
        "    def __len__(self):\n        return self.count\n"
        "    def __getitem__(self, index):\n"
        "        return {'prompt': [{'role': 'user', 'content': f'row {index}'}]}\n"
    )
    install("rows_of_mine", source, "[agentloop.datasets]\nmine = rows_of_mine:Rows\n")
    assert contents("mine", count=7) == WANTED
    with pytest.raises(DataError, match=r"yours does not exist and is not registered \(registered: mine\)"):
        open_rows("yours", "data.train")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"prompt": ', r"row 0 \(line 1\) is not valid JSON"),
        ("a.jsonl", "[1]", r"row 0 \(line 1\) is not an object"),
        ("a.jsonl", "", "has no rows"),
        ("a.csv", "x", "neither .jsonl nor .parquet"),
        ("a.parquet", "x", "cannot be read as parquet"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=says):
        list(load_tasks(str(tmp_path / name), "data.val", "d"))


def test_what_is_not_there_is_named_with_what_could_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.val: .*none.jsonl does not exist"):
        open_rows(str(tmp_path / "none.jsonl"), "data.val")
    with pytest.raises(DataError, match=r"\*.parquet has no .parquet or .jsonl"):
        open_rows(str(tmp_path / "*.parquet"), "data.val")
    with pytest.raises(DataError, match=r"my_rows does not exist and is not registered[\s\S]*agentloop.datasets"):
        open_rows("my_rows", "data.val")
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_parquet(tmp_path / "a.parquet", ROWS)
    with pytest.raises(DataError, match="files of both kinds"):
        open_rows(str(tmp_path), "data.val")


def test_a_file_cut_short_during_the_run_is_an_error_and_no_crash(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ROWS)
    rows = open_rows(source, "data.train")
    Path(source).write_text("{}\n")
    with pytest.raises(DataError, match=r"row 6 \(line 7\) is not valid JSON"):
        rows[6]


def test_a_hub_data_set_without_the_library_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # what `import` finds of a library that is not there
    (tmp_path / "state.json").write_text("{}")
    for source in ("hub:owner/name", str(tmp_path)):
        with pytest.raises(DataError, match=r"needs the library `datasets`[\s\S]*pip install 'agentloop-rl\[hub\]'"):
            open_rows(source, "data.train")


def test_a_wrong_hub_spelling_is_refused() -> None:
    with pytest.raises(DataError, match=r"write hub:owner/name\[:config\]\[@split\]"):
        open_rows("hub:a/b/c", "data.train")


def test_a_hub_that_cannot_be_reached_is_named() -> None:
    pytest.importorskip("datasets")
    code = "from agentloop.data import open_rows; open_rows('hub:no-such-owner/no-such-name:main@train', 'data.train')"
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}  # read when the library is imported; else it tries for half a minute
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (
        "DataError: data.train: hub:no-such-owner/no-such-name:main@train cannot be loaded: Couldn't" in result.stderr
    )


def test_folders_saved_by_datasets_are_read_with_the_split_of_the_key(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    image = b"\x89PNG not decoded"
    rows = [{**row, "images": [{"bytes": image, "path": None}]} for row in ROWS]
    features = datasets.Features(
        {
            "prompt": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "images": datasets.Sequence(datasets.Image()),
        }
    )
    whole = datasets.Dataset.from_list(rows, features=features)
    splits = datasets.DatasetDict({"train": whole.select(range(6, 0, -1)), "test": whole.select([0])})
    splits.save_to_disk(tmp_path / "saved")
    train = open_rows(str(tmp_path / "saved"), "data.train")
    assert [row["prompt"][0]["content"] for row in train] == WANTED[:0:-1]
    assert train[2] == rows[4]
    assert len(open_rows(str(tmp_path / "saved"), "data.val")) == 1
    assert len(open_rows(str(tmp_path / "saved" / "test"), "data.train")) == 1
    splits["other"] = splits.pop("test")
    splits.save_to_disk(tmp_path / "odd")
    with pytest.raises(DataError, match="has the splits train, other"):
        open_rows(str(tmp_path / "odd"), "data.val")


def test_a_mark_at_the_start_of_a_file_is_no_part_of_a_row(tmp_path: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8-sig")
    assert contents(str(tmp_path / "a.jsonl")) == WANTED
    (tmp_path / "b.jsonl").write_text("", encoding="utf-8-sig")
    with pytest.raises(DataError, match="has no rows"):
        open_rows(str(tmp_path / "b.jsonl"), "data.train")
    for encoding, name in (("utf-16", "UTF-16"), ("utf-16-be", "UTF-16"), ("utf-32", "UTF-32")):
        mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
        (tmp_path / "c.jsonl").write_bytes(mark + text.encode(encoding))
        with pytest.raises(DataError, match=rf"c.jsonl is encoded in {name}\n  fix: save it in UTF-8"):
            open_rows(str(tmp_path / "c.jsonl"), "data.train")
    (tmp_path / "d.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"row 0 \(line 1\) is not valid JSON"):
        open_rows(str(tmp_path / "d.jsonl"), "data.train")[0]


def test_names_that_look_like_patterns_are_names_if_they_exist(tmp_path: Path) -> None:
    for name in ("data[1].jsonl", "what?.jsonl", "all*.jsonl"):
        assert contents(write_jsonl(tmp_path / name, ROWS)) == WANTED
    write_jsonl(tmp_path / "run[2]" / "x*y" / "part-0.jsonl", ROWS[:3])
    write_jsonl(tmp_path / "run[2]" / "x*y" / "part-1.jsonl", ROWS[3:])
    assert contents(str(tmp_path / "run[2]" / "x*y" / "part-*.jsonl")) == WANTED
    assert contents(str(tmp_path / "run[2]" / "*" / "part-[01].jsonl")) == WANTED
    with pytest.raises(DataError, match=r"has no .parquet or .jsonl file"):
        open_rows(str(tmp_path / "data[2].jsonl"), "data.train")


def test_numbers_and_lists_of_numpy_are_read_as_pythons(tmp_path: Path) -> None:
    (tmp_path / "made.py").write_text(
        "import numpy as np\n"
        "def rows():\n"
        "    message = {'role': 'user', 'content': 'x'}\n"
        "    truth = {'ground_truth': np.int64(7)}\n"
        "    return [{'prompt': np.array([message], dtype=object), 'reward_model': truth, 'images': np.array([])}]\n"
    )
    [task] = load_tasks(f"{tmp_path / 'made.py'}:rows", "data.train", "d")
    assert task.prompt == [{"role": "user", "content": "x"}]
    assert type(task.ground_truth) is int and task.images == []


def test_a_parquet_value_without_a_python_object_is_named(tmp_path: Path) -> None:
    broken = pa.array([b"good", b"\xff\xfe"]).cast(pa.binary())
    column = pa.Array.from_buffers(pa.string(), 2, broken.buffers())
    pq.write_table(pa.table({"data_source": column, "prompt": [ROWS[0]["prompt"]] * 2}), tmp_path / "a.parquet")
    tasks = load_tasks(str(tmp_path / "a.parquet"), "data.train", "d")
    assert tasks[0].data_source == "good"
    for read in (lambda: tasks[1], lambda: list(tasks)):
        with pytest.raises(DataError, match=r"a.parquet, row 1 cannot be read: UnicodeDecodeError"):
            read()
