"""`benchmarks/loop_overhead.py` at tiny sizes: it runs to its end, prints its tables and writes its figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def run(repo: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repo / "benchmarks" / "loop_overhead.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def folders(model: Path) -> list[str]:
    """A small tokenizer, which every process of a measurement loads."""
    return ["--tokenizer", str(model), "--template", str(model / "chat_template.jinja")]


@pytest.mark.benchmark
def test_every_measurement_is_in_the_table_and_in_the_figures(
    repo: Path, quickstart_model: Path, tmp_path: Path
) -> None:
    result = run(repo, *folders(quickstart_model), "--quick", "--json", str(tmp_path / "out.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    rows = [line.split("|")[1:4] for line in result.stdout.splitlines() if line.startswith("| 3 ")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["3", "8", "same"],
        ["3", "8", "distinct"],
    ]
    assert "8 generations, 16 at once: " in result.stdout and "bytes a token in its columns, bound 16" in result.stdout
    assert "of generation time, bound 2%" in result.stdout and "verl is not run here" in result.stdout
    figures = json.loads((tmp_path / "out.json").read_text())
    same, distinct = figures["episodes"]
    assert same["episodes"] == 8 and same["cpu_ms_episode"] > 0
    assert 0 <= same["lag_max_s"] < 60
    assert same["tokens_episode"] > 3 * 64 and distinct["kb_tokens"] > 0
    assert figures["held"]["at_once"] == 16 and 13 < figures["held"]["bytes_token"] <= 16
    assert figures["history"]["turns"] == 16 and 1000 < figures["history"]["tokens"] < 3000


def test_a_missing_template_is_said_clearly(repo: Path, quickstart_model: Path, tmp_path: Path) -> None:
    result = run(repo, *folders(quickstart_model)[:2], "--template", str(tmp_path / "none.jinja"))
    assert result.returncode == 1
    assert "none.jinja" in result.stderr and "--template" in result.stderr and "Traceback" not in result.stderr
