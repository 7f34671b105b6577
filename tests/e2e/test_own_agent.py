"""A user's own package: installed with pip, listed, chosen by rows, trained with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, repo: Path) -> dict[str, str]:
    """The example package in a folder of its own; the environment that makes it importable."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    # A copy: building leaves files beside the sources.
    source = tmp_path_factory.mktemp("package") / "example"
    subprocess.run(["cp", "-r", str(repo / "tests" / "example_package"), str(source)], check=True)
    subprocess.run([*command, "--target", str(target), str(source)], check=True)
    return {"PYTHONPATH": str(target)}


def test_it_is_listed(agentloop: Any, installed: dict[str, str]) -> None:
    run = agentloop("agents", "list", env=installed)
    assert run.code == 0, run.err
    assert "second_thought_agent" in run.out and "second_thought:SecondThoughtAgent" in run.out
    assert "tool_agent" in run.out


def test_its_tool_format_is_known(installed: dict[str, str]) -> None:
    code = "from agentloop.chat.formats import known_formats; print(known_formats()['brackets'])"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **installed}, capture_output=True, text=True, check=False
    )
    assert "BracketFormat" in run.stdout, run.stderr


def test_it_is_trained_with_and_its_reward_runs_in_a_process(
    agentloop: Any, quickstart: Any, installed: dict[str, str], tmp_path: Path, repo: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    row = {
        "agent_name": "second_thought_agent",
        "prompt": [{"role": "user", "content": "What is 12 * 34?"}],
        "reward_model": {"style": "rule", "ground_truth": "408"},
    }
    rows.write_text((json.dumps(row) + "\n") * 4)
    run = quickstart(
        f"data.train={rows}", "data.val=null", "run.steps=2", "agents.second_thought_agent.max_response_tokens=200",
        "reward.run_in=process", env=installed,
    )  # fmt: skip
    assert run.code == 0, run.err
    for line in run.trace(2):
        assert line["agent_name"] == "second_thought_agent"
        assert any(m["content"] == "Are you sure?" for m in line["messages"]) or line["stop_reason"] != "stop"
    assert any(len(line["turns"]) >= 2 for line in run.trace(2))
    assert all(row["mismatch/logprob_abs_mean"] <= 1e-5 for row in run.train_metrics)
    assert all(row["episode/failed"] == 0 for row in run.train_metrics)
    assert {line["reward"] for step in (1, 2) for line in run.trace(step)} <= {0.0, 1.0}


def test_without_the_package_the_run_stops_before_it_starts(refused: Any, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"agent_name": "second_thought_agent", "prompt": [{"role": "user", "content": "x"}]}\n')
    run = refused(f"data.train={rows}")
    assert run.code == 2
    assert "second_thought_agent" in run.err and "agentloop agents list" in run.err
    assert not run.dir.exists()
