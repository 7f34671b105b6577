"""Errors a new user will make: each ends with code 2 (or 1), no traceback, and a message that holds the fix."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

ROW = {
    "data_source": "t",
    "agent_name": "tool_agent",
    "prompt": [{"role": "user", "content": "What is 1 + 1?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"index": 0, "split": "train"},
}


def rows(path: Path, *changed: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in (changed or [ROW])))
    return path


def says(run: Any, *words: str, code: int = 2) -> None:
    assert run.code == code, run.out + run.err
    assert "Traceback" not in run.err, run.err
    for text in words:
        assert text in run.err, run.err


def test_config_file_missing(agentloop: Any) -> None:
    says(agentloop("train", "--config", "nowhere.yaml"), "nowhere.yaml", "does not exist")


def test_unknown_key(refused: Any) -> None:
    says(refused("rollout.group_sise=3"), "rollout.group_sise", "rollout.group_size")


def test_model_path_that_is_no_model(refused: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    says(refused(f"model.path={tmp_path / 'empty'}"), str(tmp_path / "empty"), "config.json")


def test_data_file_without_a_needed_column(refused: Any, tmp_path: Path) -> None:
    bad = {key: value for key, value in ROW.items() if key != "prompt"}
    path = rows(tmp_path / "rows.jsonl", ROW, bad)
    says(refused(f"data.train={path}"), "rows.jsonl", "row 1 (line 2)", "prompt")


def test_data_file_missing(refused: Any, tmp_path: Path) -> None:
    says(refused(f"data.train={tmp_path / 'none.jsonl'}"), "none.jsonl")


def test_unknown_agent_names_row_and_known_names(refused: Any, tmp_path: Path) -> None:
    path = rows(tmp_path / "rows.jsonl", ROW, {**ROW, "agent_name": "tool_agnet"})
    says(refused(f"data.train={path}"), "tool_agnet", "row", "tool_agent", "single_turn_agent")


def test_tool_class_that_cannot_be_imported(refused: Any, tmp_path: Path) -> None:
    path = tmp_path / "tools.yaml"
    schema = "{type: function, function: {name: x, description: y, parameters: {type: object, properties: {}}}}"
    path.write_text(f"tools:\n  - class_name: tools.nothing.Here\n    config: {{}}\n    tool_schema: {schema}\n")
    says(refused(f"tools={path}"), "tools.yaml", "tools.nothing.Here")


def test_port_taken(refused: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        says(refused(f"rollout.port={port}"), str(port), "rollout.port")


def test_server_that_dies_at_start_shows_the_end_of_its_log(quickstart: Any) -> None:
    run = quickstart("rollout.engine=no_such_engine")
    says(run, "no_such_engine", "server.log", code=1)


def test_reward_file_missing(refused: Any, tmp_path: Path) -> None:
    says(refused(f"reward={tmp_path / 'none.py'}:score"), "none.py")


REWARD = """
def score(task, text, trajectory):
    if trajectory.sample_index % 2:
        raise ValueError("broken on purpose")
    return float("nan")
"""


def test_reward_that_fails_ends_the_run_with_its_causes(quickstart: Any, tmp_path: Path) -> None:
    path = tmp_path / "reward.py"
    path.write_text(REWARD)
    run = quickstart(f"reward={path}:score", "run.steps=1", "eval.before_train=false")
    says(run, "broken on purpose", "nan", "episodes", code=1)
    traced = run.trace(1)
    assert {line["status"] for line in traced} == {"failed"}
    assert all(("broken on purpose" if line["sample_index"] % 2 else "nan") in line["error"] for line in traced)


def test_tool_that_raises_is_told_to_the_model_and_the_run_goes_on(quickstart: Any, tmp_path: Path) -> None:
    (tmp_path / "broken_tool.py").write_text(
        "from tools.calculator import Calculator\n\n\n"
        "class Broken(Calculator):\n"
        "    async def execute(self, *args, **kwargs):\n        raise ValueError('tool broken on purpose')\n"
    )
    schema = (Path(__file__).resolve().parents[2] / "recipes/quickstart/tools.yaml").read_text()
    (tmp_path / "tools.yaml").write_text(schema.replace("tools.calculator.Calculator", "broken_tool.Broken"))
    run = quickstart(
        f"tools={tmp_path / 'tools.yaml'}",
        "run.steps=1",
        "eval.before_train=false",
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert run.code == 0, run.err
    assert run.train_metrics[0]["episode/tool_errors_mean"] > 0
    told = [m["content"] for line in run.trace(1) for m in line["messages"] if m["role"] == "tool"]
    assert any("tool broken on purpose" in text for text in told)
