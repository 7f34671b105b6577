"""`agentloop trace rescore`: the stored rewards to the bit, or another function's beside them."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from agentloop.errors import ConfigError, RewardError, TraceError
from agentloop.reward.rescoring import TaskFinder, unscored
from agentloop.trace.record import TraceRecord
from agentloop.trace.store import TraceStore
from agentloop.types import Task
from tests.agentloop.commands.trace.support import command, failed, record, write_run

OWN = """
def score(task, text, trajectory):
    assert trajectory.reward is None and trajectory.status == "ok" and trajectory.reward_parts == {}
    sample = trajectory.sample_index
    return {"score": sample * 0.1 + int(task.ground_truth) / 3, "format": 0.5, "answer": text.removeprefix("#### ")}
"""

OTHER = """
def score(task, text, trajectory):
    if task.task_id == "row0":
        raise ValueError("row0 is wrong")
    return {"score": float(trajectory.sample_index) - 0.25, "format": 1.0, "length": len(text), "answer": "x"}
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = write_run(tmp_path / "small", steps=2)
    (run / "own.py").write_text(OWN)
    (tmp_path / "other.py").write_text(OTHER)
    rows = [
        {
            "prompt": [
                {"role": "system", "content": "Answer with the number."},
                {"role": "user", "content": f"What is {number} + {step}?"},
            ],
            "reward_model": {"ground_truth": number},
            "extra_info": {"index": f"row{number}"},
        }
        for number in range(4)
        for step in (1, 2)
    ]
    (run / "rows.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    config = orjson.loads((run / "config" / "resolved.json").read_bytes())
    config |= {
        "reward": {"function": f"{run / 'own.py'}:score"},
        "data": {"train": str(run / "rows.jsonl"), "val": None, "default_agent": "tool_agent", "options": {}},
    }
    (run / "config" / "resolved.json").write_bytes(orjson.dumps(config))
    store = TraceStore(run)
    for step in (1, 2):
        records = store.records(step, "train")
        for made in records:
            if made.trajectory.reward is not None:
                number = int(made.trajectory.task_id.removeprefix("row"))
                made.trajectory.reward = made.trajectory.sample_index * 0.1 + number / 3
        store.write(step, "train", records)
    return run


def test_the_runs_own_reward_gives_the_stored_rewards_to_the_bit(run_dir: Path) -> None:
    shown = command("rescore", run_dir)
    assert shown.exception is None, shown.exception
    assert "every reward is the stored one, to the bit (13)" in shown.stdout
    assert "left out, because they failed before their reward: 1" in shown.stdout
    assert "their row's prompt" not in shown.stdout, "each episode found the row of its own prompt"


def test_a_suffix_of_another_form_is_refused(run_dir: Path, tmp_path: Path) -> None:
    refused = command("rescore", run_dir, "--out", tmp_path / "new.parquet")
    assert isinstance(refused.exception, TraceError) and "rescore writes JSON lines" in str(refused.exception)


def test_another_reward_is_shown_beside_the_old_one(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "new.jsonl"
    shown = command("rescore", run_dir, "--reward", f"{tmp_path / 'other.py'}:score", "--out", out, "--json")
    assert shown.exception is None, shown.exception
    found = orjson.loads(shown.stdout)
    rows = [orjson.loads(line) for line in out.read_bytes().splitlines()]
    assert found["episodes"] == len(rows) == 13 and found["failed"] == 4 and found["compared"] == 9
    assert found["errors"][0]["episodes"] == 4 and "row0 is wrong" in found["errors"][0]["error"]
    assert found["changed"] == 9 and found["higher"] == 2 and found["lower"] == 7
    assert found["parts"]["format"] == {"old": 0.5, "new": 1.0, "changed": 9}
    assert found["parts"]["length"]["old"] is None
    biggest = found["biggest"][0]
    assert biggest["key"] == "train/2/g2-3/0/0" and biggest["new"] == -0.25 and biggest["new_answer"] == "x"
    assert rows[0]["key"] == "train/1/g1-0/0/0" and rows[0]["new"] is None and rows[0]["changed"]


def test_filters_and_files(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "new.jsonl"
    assert orjson.loads(command("rescore", run_dir, "--step", "1", "--limit", "2", "--json").stdout)["episodes"] == 2
    out.write_text("kept")
    assert isinstance(command("rescore", run_dir, "--out", out).exception, TraceError)
    assert out.read_text() == "kept"
    (tmp_path / "bad.py").write_text("def score(task, text, trajectory): raise ValueError('always')")
    shown = command("rescore", run_dir, "--reward", f"{tmp_path / 'bad.py'}:score", "--out", out, "--force")
    assert isinstance(shown.exception, RewardError) and "always" in shown.exception.message
    assert out.read_text() == "kept", "nothing replaces a file if no episode was scored"


def test_what_failed_because_of_its_reward_is_scored_anew(run_dir: Path) -> None:
    store = TraceStore(run_dir)
    records = store.records(1, "train")
    records[0] = failed(records[0], "the reward raised ValueError: x")
    store.write(1, "train", records)
    found = orjson.loads(command("rescore", run_dir, "--step", "1", "--json").stdout)
    assert found["scored_anew"] == 1 and found["compared"] == 5 and found["changed"] == 0


def test_rows_that_changed_are_said(run_dir: Path) -> None:
    rows = run_dir / "rows.jsonl"
    rows.write_text(rows.read_text().replace("What is 1 +", "How much is 1 +").replace('"row2"', '"row7"'))
    shown = command("rescore", run_dir)
    assert "conversations that do not begin with their row's prompt (the rows changed): 4" in shown.stdout
    assert "could not be scored: 4: no row has the task_id 'row2'" in shown.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [({"reward": None}, "has no reward function"), ({"data": {}}, "names no data.train")],
)
def test_a_run_that_names_no_reward_or_no_rows_is_refused(
    run_dir: Path, change: dict[str, object], message: str
) -> None:
    path = run_dir / "config" / "resolved.json"
    path.write_bytes(orjson.dumps(orjson.loads(path.read_bytes()) | change))
    error = command("rescore", run_dir).exception
    assert isinstance(error, TraceError) and message in error.message and error.hint


def test_a_reward_that_does_not_exist_is_refused(run_dir: Path) -> None:
    assert isinstance(command("rescore", run_dir, "--reward", "nowhere.py:score").exception, ConfigError)


def task(name: str, text: str) -> Task:
    return Task(name, "tool_agent", [{"role": "user", "content": text}])


def stored(name: str, text: str, row: int | None) -> TraceRecord:
    made = record(1, 0, 0)
    made.trajectory.task_id, made.trajectory.messages, made.row = name, [{"role": "user", "content": text}], row
    return made


def test_a_task_is_found_by_its_row_then_its_id_then_its_prompt() -> None:
    tasks = [task("a", "one"), task("b", "two"), task("b", "three")]
    finder = TaskFinder(tasks)
    assert finder.find(stored("b", "three", 2)) == (tasks[2], True)
    assert finder.find(stored("b", "three", 1)) == (tasks[2], True), "the rows have moved"
    assert finder.find(stored("b", "two", None)) == (tasks[1], True)
    assert finder.find(stored("b", "four", None)) == (tasks[1], False)
    assert finder.find(stored("c", "one", 0)) is None
    assert finder.find(stored("a", "one", 99)) == (tasks[0], True)


def test_the_reward_sees_the_trajectory_as_in_the_run() -> None:
    made = record(1, 0, 0).trajectory
    made.metrics["reward_s"] = 1.0
    seen = unscored(made)
    assert seen.reward is None and seen.outcome is None and seen.reward_parts == {} and seen.answer is None
    assert "reward_s" not in seen.metrics and seen.metrics["tool_calls"] == 1.0
    assert seen.token_ids == made.token_ids and seen.turns == made.turns and made.reward is not None


def test_rewards_that_could_not_be_scored_are_not_called_equal(run_dir: Path, tmp_path: Path) -> None:
    partly = OWN.replace("    sample =", '    assert task.task_id != "row0", "row0 is wrong"\n    sample =')
    (tmp_path / "partly.py").write_text(partly)
    shown = command("rescore", run_dir, "--reward", f"{tmp_path / 'partly.py'}:score")
    assert shown.exception is None, shown.exception
    assert "4 episodes could not be scored; the other 9 rewards are the stored ones" in shown.stdout
    assert "to the bit" not in shown.stdout
