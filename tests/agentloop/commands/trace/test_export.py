"""`agentloop trace export`: each form, what is selected, files that appear whole."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest
from nat.atif.trajectory import Trajectory as AtifTrajectory

from agentloop.errors import TraceError, UserError
from agentloop.trace.export.writing import NothingWritten
from agentloop.trace.store import TraceStore
from agentloop.types import Trajectory
from tests.agentloop.commands.trace.support import command, cut, record, with_example, write_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "small")


def exported(run: Path, form: str, *words: object, out: str = "out.jsonl") -> list[dict[str, Any]]:
    path = run.parent / out
    shown = command("export", run, "--format", form, "--out", path, "--force", *words)
    assert shown.exception is None, shown.exception
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def test_jsonl_has_every_trajectory_with_everything(run_dir: Path) -> None:
    rows = exported(run_dir, "jsonl", "--step", "3")
    assert [row["key"] for row in rows if "g3-2/1" in row["key"]] == ["train/3/g3-2/1/0", "train/3/g3-2/1/1"]
    row = rows[0]
    stored = TraceStore(run_dir).record(row["key"])
    known = {key: value for key, value in row.items() if key in stored.trajectory.to_json()}
    assert Trajectory.from_json(known) == Trajectory.from_json(stored.trajectory.to_json())
    assert row["trainer_logprobs"][0] is None and row["trainer_logprobs"][6] == pytest.approx(-0.135)
    assert row["advantages"][6] == 0.5 and row["row"] == 0 and row["version"] == 2


@pytest.mark.parametrize(
    ("form", "out", "fix"),
    [
        ("sft", "x.parquet", "x.jsonl, or choose --format parquet"),
        ("jsonl", "x.PARQUET", "x.jsonl, or choose --format parquet"),
        ("messages", "x.json", "x.jsonl, or choose --format atif"),
        ("sft", "x.jsonl.gz", "x.jsonl"),
        ("atif", "x.parquet", "x.jsonl, or choose --format parquet"),
        ("parquet", "x.jsonl", "x.parquet, or choose --format jsonl or atif or messages or sft"),
        ("parquet", "x.csv", "x.parquet"),
    ],
)
def test_a_suffix_of_another_form_is_refused(run_dir: Path, tmp_path: Path, form: str, out: str, fix: str) -> None:
    refused = command("export", run_dir, "--format", form, "--out", tmp_path / out, "--force")
    assert isinstance(refused.exception, TraceError) and f"is named {Path(out).suffix.lower()}" in str(
        refused.exception
    )
    assert str(refused.exception).endswith(fix) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["rows", "rows-0.6", "rows.ndjson", "rows.txt"])
def test_a_suffix_that_names_no_other_form_is_taken(run_dir: Path, tmp_path: Path, out: str) -> None:
    assert command("export", run_dir, "--format", "sft", "--out", tmp_path / out).exception is None
    assert (tmp_path / out).is_file()


def test_parquet_has_the_columns_of_the_store(run_dir: Path) -> None:
    path = run_dir.parent / "out.parquet"
    command("export", run_dir, "--format", "parquet", "--min-reward", "1", "--out", path, "--force")
    table = pq.read_table(path)
    assert set(table["reward"].to_pylist()) == {1.0}
    assert table["token_ids"][0].as_py() == list(range(100, 118))


def test_atif_documents_are_valid_and_hold_the_exact_tokens(run_dir: Path) -> None:
    documents = exported(run_dir, "atif", "--split", "all")
    for document in documents:
        AtifTrajectory.model_validate(document)
        assert document["schema_version"] == "ATIF-v1.7"
    document = documents[0]
    stored = TraceStore(run_dir).record(document["trajectory_id"]).trajectory
    steps = document["steps"]
    assert [step["source"] for step in steps] == ["system", "user", "agent", "agent"]
    for step, turn in zip(steps[2:], stored.turns, strict=True):
        metrics = step["metrics"]
        assert metrics["prompt_token_ids"] == list(stored.token_ids[: turn.start])
        assert metrics["completion_token_ids"] == list(stored.token_ids[turn.start : turn.end])
        assert metrics["logprobs"] == list(stored.logprobs[turn.start : turn.end])
    assert steps[2]["reasoning_content"] == "I shall compute it."
    assert steps[2]["observation"]["results"][0] == {
        "source_call_id": "c0",
        "content": "1",
        "extra": {"name": "calculator"},
    }
    assert steps[2]["extra"]["step_rewards"] == [{"name": "calculator", "value": 0.25}]
    assert steps[2]["timestamp"].startswith("2023-11-14T22:13:21") and steps[3]["metrics"]["cached_tokens"] == 11
    assert document["agent"]["tool_definitions"][0]["function"]["name"] == "calculator"


def test_atif_embeds_forks_and_marks_what_nobody_sampled(run_dir: Path, tmp_path: Path) -> None:
    (document,) = exported(run_dir, "atif", "--key", "train/3/g3-2/1")
    assert [other["trajectory_id"] for other in document["subagent_trajectories"]] == ["train/3/g3-2/1/0"]

    TraceStore(tmp_path / "run").write(1, "train", [with_example(record(1, 0, 0))])
    (document,) = exported(tmp_path / "run", "atif", "--no-tools", "--no-token-ids")
    AtifTrajectory.model_validate(document)
    copied = [step.get("is_copied_context") for step in document["steps"] if step["source"] == "agent"]
    assert copied == [True, None, None]
    assert "prompt_token_ids" not in document["steps"][-1]["metrics"]


def test_one_atif_document_fills_a_json_file(run_dir: Path) -> None:
    (document,) = exported(run_dir, "atif", "--key", "train/1/g1-0/0/0", out="one.json")
    assert document["trajectory_id"] == "train/1/g1-0/0/0"
    shown = command("export", run_dir, "--format", "atif", "--out", run_dir.parent / "many.json")
    assert isinstance(shown.exception, TraceError) and ".jsonl" in str(shown.exception.hint)
    assert not list(run_dir.parent.glob("many.json*"))


def test_messages_have_conversations_with_tools_and_rewards(run_dir: Path) -> None:
    rows = exported(run_dir, "messages")
    assert {row["status"] for row in rows} == {"ok"}
    assert rows[0]["tools"][0]["function"]["name"] == "calculator"
    assert rows[0]["messages"] == TraceStore(run_dir).record(rows[0]["key"]).trajectory.messages


def test_sft_trains_only_whole_turns_that_the_model_sampled(tmp_path: Path) -> None:
    run = tmp_path / "run"
    TraceStore(run).write(1, "train", [with_example(record(1, 0, 0)), cut(record(1, 1, 0))])
    (row,) = exported(run, "sft")
    flags = [message.get("train") for message in row["messages"] if message["role"] == "assistant"]
    assert flags == [False, None, None]
    shown = command("export", run, "--format", "sft", "--out", "-")
    assert "left out, no turn is whole: each was cut at a limit, has a malformed call or is empty: 1" in shown.stderr
    assert "standard output: 1 row of 2 episodes" in shown.stderr


def test_an_export_that_leaves_every_episode_out_writes_no_file(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "rows.jsonl"
    TraceStore(run).write(1, "train", [cut(record(1, group, 0)) for group in range(3)])
    for where in (out, "-"):
        failure = command("export", run, "--format", "sft", "--out", where).exception
        assert isinstance(failure, NothingWritten) and not isinstance(failure, UserError), "the exit code is 1"
        assert "3 episodes left out: no turn is whole" in failure.message
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_best_of_group_and_limit(run_dir: Path) -> None:
    rows = exported(run_dir, "sft", "--best-of-group")
    assert [row["key"].split("/")[3] for row in rows] == ["1"] * 9 + ["0"], "the failed sample is not the best"
    assert len(exported(run_dir, "sft", "--best-of-group", "--min-reward", "0.5", "--limit", "4")) == 4


def test_a_file_is_not_replaced_unless_asked(run_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    path.write_text("kept")
    shown = command("export", run_dir, "--format", "jsonl", "--out", path)
    assert isinstance(shown.exception, TraceError) and "--force" in str(shown.exception.hint)
    assert path.read_text() == "kept"
    assert command("export", run_dir, "--format", "jsonl", "--out", path, "--force").exception is None
    assert path.read_text() != "kept" and [each.name for each in tmp_path.iterdir()] == ["kept.jsonl"]


def test_nothing_is_written_if_nothing_matches_or_tools_are_missing(run_dir: Path, tmp_path: Path) -> None:
    shown = command("export", run_dir, "--format", "sft", "--min-reward", "7", "--out", tmp_path / "none")
    assert isinstance(shown.exception, TraceError) and "no episode matches" in shown.exception.message
    run = write_run(tmp_path / "run", steps=1)
    (run / "tools.yaml").unlink()
    shown = command("export", run, "--format", "sft", "--out", tmp_path / "none")
    assert isinstance(shown.exception, TraceError) and "--no-tools" in str(shown.exception.hint)
    assert not (tmp_path / "none").exists()


def test_a_cut_trace_is_named_and_the_rest_exported(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=2)
    path = TraceStore(run).path(1, "train")
    path.write_bytes(path.read_bytes()[:50])
    shown = command("export", run, "--format", "jsonl", "--out", tmp_path / "rest.jsonl")
    assert shown.exception is None and str(path) in shown.stderr
    rows = [orjson.loads(line) for line in io.BytesIO((tmp_path / "rest.jsonl").read_bytes())]
    assert {row["step"] for row in rows} == {2}
