"""`benchmarks/token_law.py`: it finds nothing in the system as it is, and finds each fault that is planted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def run(repo: Path, shared: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repo / "benchmarks" / "token_law.py"), "--seed", "7"]
    folders = ["--tokenizer", str(shared / "tokenizers" / "qwen"), "--templates", str(shared / "chat_templates")]
    return subprocess.run([*command, *folders, *arguments], capture_output=True, text=True, check=False)


def test_two_thousand_random_turns_keep_the_law(repo: Path, shared: Path) -> None:
    result = run(repo, shared, "--turns", "2000")
    assert result.returncode == 0, result.stdout + result.stderr
    assert ": 0 violations" in result.stdout and "turns a second of CPU" in result.stdout
    for template in ("qwen2_5 ", "qwen3 ", "phi3_5 "):
        [line] = [line for line in result.stdout.splitlines() if line.startswith(template)]
        assert "refused" not in line


@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        ("retokenized", 1),
        ("version", 1),
        ("prompt", 2),
        ("separator", 3),
        ("control", 3),
        ("fork", 4),
        ("length", 5),
        ("silent", 5),
    ],
)
def test_a_planted_fault_is_found(repo: Path, shared: Path, fault: str, rule: int) -> None:
    result = run(repo, shared, "--turns", "4000", "--template", "qwen2_5", "--plant", fault)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"VIOLATION of rule {rule}:" in result.stdout


def test_a_missing_tokenizer_is_said_clearly(repo: Path, shared: Path, tmp_path: Path) -> None:
    result = run(repo, shared, "--tokenizer", str(tmp_path / "nowhere"))
    assert result.returncode == 1
    assert "nowhere" in result.stderr and "--tokenizer" in result.stderr and "Traceback" not in result.stderr
