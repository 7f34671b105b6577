"""A foreign `trainer` or `tools` must not be run in place of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agentloop.commands.provenance import environment, package_origins


def run_agentloop(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "agentloop.commands.main", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
    )


def test_all_packages_are_ours() -> None:
    assert [origin.name for origin in package_origins() if origin.ours] == [
        "agentloop",
        "rollout_server",
        "trainer",
        "tools",
        "recipes",
    ]


def test_a_foreign_tools_package_stops_any_command(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "__init__.py").write_text("raise SystemExit('foreign code ran')")
    result = run_agentloop("agents", "list", PYTHONPATH=str(tmp_path))
    assert result.returncode == 2
    assert "'tools' is not agentloop's" in result.stderr and str(tmp_path) in result.stderr
    assert "foreign code ran" not in result.stderr


def test_env_shows_a_foreign_package_and_fails(tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").write_text("")
    result = run_agentloop("env", PYTHONPATH=str(tmp_path))
    # the trainer's own commands cannot be loaded then; the message names what is wrong either way
    assert result.returncode == 2
    assert str(tmp_path) in result.stdout + result.stderr


def test_env_prints_where_packages_come_from(repo: Path) -> None:
    result = run_agentloop("env", "--json")
    assert result.returncode == 0, result.stderr
    packages = json.loads(result.stdout)["packages"]
    assert packages["trainer"] == str(repo / "trainer" / "__init__.py")


def test_the_environment_of_a_run_names_versions() -> None:
    data = environment()
    assert data["versions"]["torch"] and data["python"] and data["cores"] >= 1


def test_no_secret_of_the_command_line_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["rollout.token=AAA", "+rollout.token=AAA", "++rollout.admin_token=AAA", "rollout={token: AAA}", "seed=1"]
    monkeypatch.setattr(sys, "argv", ["agentloop", "train", *words])
    recorded = environment()["argv"]
    assert "AAA" not in " ".join(recorded) and recorded[-1] == "seed=1" and recorded[1] == "rollout.token=(hidden)"
