"""`agentloop trace import`: old JSON lines become parquet, once, and nothing is lost without a word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agentloop.errors import TraceError
from agentloop.trace.store import TraceStore
from tests.agentloop.commands.trace.support import command
from tests.agentloop.trace.store.support import step_records


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of an earlier version: two steps and an evaluation, one line torn."""
    for step, split in ((1, "train"), (2, "train"), (2, "eval")):
        folder = tmp_path / "traces" / f"step_{step}"
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(record.trajectory.to_json() | {"pieces": ["x"]}) + "\n" for record in step_records(step)]
        (folder / f"{split}.jsonl").write_text("".join(lines) + ('{"format": 1, "tok' if split == "eval" else ""))
    return tmp_path


def test_old_traces_are_read_and_converted(run: Path) -> None:
    store = TraceStore(run)
    wanted = [record.trajectory for record in step_records(2)]
    old = store.records(2, "train")
    assert [record.trajectory for record in old] == wanted
    assert {(record.step, record.split, record.version, record.part, record.parts) for record in old} == {
        (2, "train", 1, 0, 1)
    }
    assert [len(table) for _, table in store.scan()] == [8, 8, 8]
    assert store.record(old[3].key).trajectory == wanted[3]
    (problem,) = store.problems()
    assert "3 files in the old JSON form" in str(problem) and "agentloop trace import" in str(problem)

    said = command("import", run)
    assert said.exit_code == 0, said.output
    assert "step_1/train.jsonl: 8 trajectories" in said.output
    assert "step_2/eval.jsonl: 8 trajectories; 1 lines hold no trajectory" in said.output
    assert store.problems() == [] and not any(file.old for file in store.files())
    assert [record.trajectory for record in store.records(2, "train")] == wanted
    assert store.path(1, "train").with_suffix(".jsonl").is_file()


def test_it_can_be_repeated_and_then_delete(run: Path) -> None:
    store = TraceStore(run)
    command("import", run)
    stamps = [file.path.stat().st_mtime_ns for file in store.files()]
    cut = store.path(2, "train")
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-9])
    said = command("import", run, "--delete")
    assert said.output.count("converted already") == 2
    assert cut.read_bytes() == whole, "a cut file is made again"
    assert stamps[0] == store.files()[0].path.stat().st_mtime_ns
    assert [path.name for path in sorted(run.glob("traces/*/*.jsonl"))] == ["eval.jsonl"], "it has a line that is lost"
    assert "no traces in the old form" not in command("import", run).output
    (run / "traces" / "step_2" / "eval.jsonl").unlink()
    assert "no traces in the old form" in command("import", run).output


def test_columns_that_no_class_holds_are_kept(run: Path) -> None:
    path = run / "traces" / "step_1" / "train.jsonl"
    line = json.loads(path.read_text().splitlines()[0])
    line |= {"status": "rejected", "logprobs": [-1.0, "x"], "versions": None}
    path.write_text(json.dumps(line) + "\n" + json.dumps(line | {"token_ids": "no"}) + "\n[1]\n")
    said = command("import", run)
    assert "step_1/train.jsonl: 1 trajectories; 2 lines hold no trajectory" in said.output
    (record,) = TraceStore(run).records(1, "train")
    assert record.trajectory.logprobs == [-1.0, "x"] and record.trajectory.token_ids == line["token_ids"]


def test_lines_that_cannot_be_read_are_counted(run: Path) -> None:
    path = run / "traces" / "step_1" / "train.jsonl"
    path.write_text('{"a": 1}\n' * 5)
    said = command("list", run, "--step", "1")
    assert f"none of the 5 lines of {path} can be read" in said.stderr
    assert "no episode that can be read matches" in said.stdout
    said = command("list", run, "--step", "2")
    eval_path = run / "traces" / "step_2" / "eval.jsonl"
    assert f"8 of the 9 lines of {eval_path} can be read" in said.stderr and "none of the" not in said.stderr
    said = command("export", run, "--step", "1", "--format", "sft", "--out", run / "x.jsonl")
    assert f"none of the 5 lines of {path} can be read" in said.stderr and isinstance(said.exception, TraceError)


def test_a_file_of_which_no_line_can_be_read_is_not_converted(run: Path) -> None:
    path = run / "traces" / "step_1" / "train.jsonl"
    path.write_text('{"a": 1}\n' * 5)
    said = command("import", run, "--delete")
    assert said.exit_code == 1 and "2 files: " in said.stdout
    assert "step_1/train.jsonl: none of its 5 lines holds a trajectory; it is not converted" in said.stderr
    assert path.is_file() and not path.with_suffix(".parquet").exists()
    assert path.parent.with_name("step_2").joinpath("train.parquet").is_file()


def test_a_wrong_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="none does not exist"):
        raise command("import", tmp_path / "none").exception or AssertionError
