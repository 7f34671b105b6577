"""A simulated user in a real run of two steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    row = {
        "agent_name": "tool_agent",
        "prompt": [{"role": "user", "content": "What is 12 * 34?"}],
        "reward_model": {"style": "rule", "ground_truth": "408"},
        "extra_info": {"interaction_kwargs": {"name": "teacher"}},
    }
    path.write_text((json.dumps(row) + "\n") * 4)
    (tmp_path / "interactions.yaml").write_text(
        "interaction: [{name: teacher, class_name: gsm8k, config: {max_tries: 3, format_score: 0.1}}]\n"
    )
    return path


def test_a_run_with_a_teacher_learns_from_its_rewards(quickstart: Any, rows: Path, tmp_path: Path) -> None:
    run = quickstart(
        f"data.train={rows}", "data.val=null", "run.steps=2", f"interactions={tmp_path / 'interactions.yaml'}",
        "reward=null", "trainer.algorithm.advantage=grpo_process", "agents.tool_agent.max_response_tokens=240",
    )  # fmt: skip
    assert run.code == 0, run.err
    lines = run.trace(2)
    assert any("Look for the mistake" in str(m["content"]) for line in lines for m in line["messages"])
    answered = [line for line in lines if line["step_rewards"]]
    assert answered
    for line in answered:
        spans = {(turn["start"], turn["end"]) for turn in line["turns"]}
        assert all((reward["start"], reward["end"]) in spans for reward in line["step_rewards"])
        assert line["reward"] == pytest.approx(sum(reward["value"] for reward in line["step_rewards"]))
    for row in run.train_metrics:
        assert row["mismatch/logprob_abs_mean"] <= 1e-5 and row["episode/rejected"] == 0
        assert 0 <= row["loop/lag_p99_s"] <= row["loop/lag_max_s"]


def test_a_row_that_names_nobody_stops_the_run_before_it_starts(refused: Any, rows: Path) -> None:
    run = refused(f"data.train={rows}", "data.val=null")
    assert run.code == 2 and not run.dir.exists()
    place = f"data.train: {rows}, row 0 (line 1): column 'extra_info.interaction_kwargs'"
    assert f"{place} names the interaction 'teacher'; known: gsm8k" in run.err
