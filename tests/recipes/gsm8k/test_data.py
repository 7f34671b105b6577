"""Public data sets become rows with prompt, tools and ground truth; and the reward that reads their answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agentloop.data import load_tasks
from agentloop.errors import DataError
from agentloop.types import Task, Trajectory
from recipes.gsm8k.data import make_row, make_user_row, prepare
from recipes.gsm8k.reward import compute_score, extract_answer, score
from recipes.quickstart.reward import score as quickstart_score


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_gsm8k_rows_have_tool_and_ground_truth() -> None:
    row = make_row({"question": "How many?", "answer": "1 + 1 = 2\n#### 1,234"}, "train", 0)
    assert row["reward_model"]["ground_truth"] == "1234" and row["agent_name"] == "tool_agent"
    assert row["extra_info"]["tools_kwargs"]["calc_gsm8k_reward"]["create_kwargs"] == {"ground_truth": "1234"}
    assert row["prompt"][0]["role"] == "system" and "calc_gsm8k_reward" in row["prompt"][0]["content"]


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("#### -5", "-5"),
        ("#### 1,234.", "1234"),
        ("#### 72 clips\n", "72"),
        ("first #### 1\nthen\r\n#### 2", "2"),
        ("x" * 100_000 + "#### 3", "3"),
        ("#### " + "9" * 100_000 + "..", "9" * 100_000),
    ],
    ids=lambda text: text[:8],
)
def test_the_ground_truth_is_the_last_number_of_the_form(answer: str, truth: str) -> None:
    assert make_row({"question": "q", "answer": answer}, "train", 0)["reward_model"]["ground_truth"] == truth


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "answer": "no mark"},
        {"answer": "#### 1"},
        {"question": 5, "answer": "#### 1"},
        ["q"],
        {"question": " \n", "answer": "#### 1"},
        *({"question": "q", "answer": f"#### {text}"} for text in (".", ",", "-", "1.2.3", "$5", "")),
    ],
)
def test_a_gsm8k_row_without_answer_or_question_is_named(row: Any) -> None:
    with pytest.raises(DataError, match="train, row 3 has no"):
        make_row(row, "train", 3)


def test_gsm8k_is_prepared_whole_or_not_at_all(tmp_path: Path) -> None:
    good = {"question": "q", "answer": "#### 3"}
    write(tmp_path / "train.jsonl", good, good)
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"has neither test\.jsonl"):
        prepare(str(tmp_path), out)
    assert not list(out.glob("*"))
    write(tmp_path / "test.jsonl", good)
    assert prepare(str(tmp_path), out) == {
        "train.parquet": 2, "user_train.parquet": 2, "test.parquet": 1, "user_test.parquet": 1
    }  # fmt: skip
    tasks = load_tasks(str(out / "train.parquet"), "data.train", "d")
    assert tasks[1].ground_truth == "3" and tasks[1].task_id == "1"


def test_damaged_and_empty_files_are_named(tmp_path: Path) -> None:
    for name in ("train.parquet", "test.parquet"):
        (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"train\.parquet"):
        prepare(str(tmp_path), tmp_path / "out")
    for name in ("train.jsonl", "test.jsonl"):
        write(tmp_path / name)
    with pytest.raises(DataError, match=r"has no rows for train\.parquet"):
        prepare(str(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_generated_rows_do_not_name_the_data_set_of_the_hub(tmp_path: Path) -> None:
    prepare("generated", tmp_path)
    for file in tmp_path.iterdir():
        assert set(pq.read_table(file)["data_source"].to_pylist()) == {"gsm8k/twin"}


def test_an_interrupted_prepare_leaves_the_earlier_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare("generated", tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    write_table, written = pq.write_table, []

    def interrupted(table: Any, file: Any) -> None:
        written.append(table)
        if len(written) == 3:
            raise KeyboardInterrupt
        write_table(table.slice(0, 1), file)

    monkeypatch.setattr(pq, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare("generated", tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_rows_for_the_simulated_user_name_it_and_no_tool(tmp_path: Path) -> None:
    row = make_user_row({"question": "How many?", "answer": "#### 3"}, "train", 0)
    assert row["extra_info"]["interaction_kwargs"] == {"name": "gsm8k", "query": "How many?", "ground_truth": "3"}
    assert row["extra_info"]["need_tools_kwargs"] is False and "tools_kwargs" not in row["extra_info"]
    assert "calc_gsm8k_reward" not in row["prompt"][0]["content"]


def test_made_up_problems_need_no_source(tmp_path: Path) -> None:
    counts = prepare("generated", tmp_path)
    assert counts["train.parquet"] == 64 and counts["user_test.parquet"] == 16
    rows = load_tasks(str(tmp_path / "train.parquet"), "data.train", "d")
    assert all(str(row.ground_truth).isdigit() and row.agent_name == "tool_agent" for row in rows)


def test_gsm8k_reads_the_hubs_own_layout(tmp_path: Path) -> None:
    (tmp_path / "main").mkdir()
    for split in ("train", "test"):
        table = pa.Table.from_pylist([{"question": "q", "answer": "#### 3"}])
        pq.write_table(table, tmp_path / "main" / f"{split}-00000-of-00001.parquet")
    counts = prepare(str(tmp_path), tmp_path / "out")
    assert counts["train.parquet"] == counts["test.parquet"] == 1


def test_a_data_set_that_cannot_be_downloaded_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="could not be downloaded"):
        prepare("no such/data set/at all", tmp_path)


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("#### 12", "12", "12"),
        ("#### 1,234.", "1234", "1234"),
        ("so 5 it is", None, "5"),
        ("#### 3 no #### -4", "-4", "-4"),
        ("#### 3" + "x" * 400, None, "3"),
        ("none", None, None),
    ],
)
def test_gsm8k_answers(text: str, strict: str | None, flexible: str | None) -> None:
    assert (extract_answer(text), extract_answer(text, "flexible")) == (strict, flexible)


def test_gsm8k_scores() -> None:
    assert compute_score("#### 1,000", "1000") == 1.0
    assert compute_score("#### 2", "1") == 0.0
    assert compute_score("#### 2", "1", format_score=0.1) == 0.1
    assert compute_score("2", "1", format_score=0.1) == 0.0


def test_the_gsm8k_reward_says_which_number_it_read() -> None:
    task = Task("0", "a", [], ground_truth="1234")
    trajectory = Trajectory([1], [0], [None], [None], 1)
    assert score(task, "so it is\n#### 1,234", trajectory) == {"score": 1.0, "correct": 1.0, "answer": "1234"}
    assert score(task, "no idea", trajectory) == {"score": 0.0, "correct": 0.0, "answer": ""}


@pytest.mark.parametrize("truth", ["72", 72, 72.0, "72.00", "$72"])
def test_numbers_are_compared_as_numbers(truth: Any) -> None:
    assert compute_score("so #### 72", truth) == compute_score("so #### 72.0", truth) == 1.0
    assert compute_score("so #### 73", truth) == 0.0
    assert quickstart_score(Task("0", "a", [], ground_truth=truth), "#### 72", TRAJECTORY) == 1.0


def test_without_a_ground_truth_an_episode_fails_instead_of_scoring_0() -> None:
    for scored in (score, quickstart_score):
        with pytest.raises(ValueError, match="no ground truth"):
            scored(Task("0", "a", []), "#### 72", TRAJECTORY)


def test_integers_beyond_64_bits_are_exact() -> None:
    truth = 10**30 + 5
    assert compute_score(f"#### {truth}", truth) == 1.0 and compute_score(f"#### {truth + 1}", truth) == 0.0


TRAJECTORY = Trajectory([], [], [], [], 0)
