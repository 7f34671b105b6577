"""`benchmarks/token_law.py`: it finds nothing in the system as it is, and finds each fault that is planted."""

from __future__ import annotations

import asyncio
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Planted = Callable[[str], tuple[Any, type[Exception]]]


def run(repo: Path, shared: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repo / "benchmarks" / "token_law.py"), "--seed", "7"]
    folders = ["--tokenizer", str(shared / "tokenizers" / "qwen"), "--templates", str(shared / "chat_templates")]
    return subprocess.run([*command, *folders, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def planted(repo: Path, shared: Path) -> Iterator[Planted]:
    """Makes the bench of a planted fault, and names the exception it ends with; the tokenizer is loaded once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repo / "benchmarks"))
        law: Any = importlib.import_module("token_law")
        templates = {path.stem: path.read_text() for path in (shared / "chat_templates").glob("qwen2_5.jinja")}
        tokenizer = law.load_with_controls(shared / "tokenizers" / "qwen", templates)
        controls = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.content.strip()}

        def make(fault: str) -> tuple[Any, type[Exception]]:
            chance = law.Chance(7, len(tokenizer) + law.ROWS_BEYOND, controls)
            return law.Bench("qwen2_5", templates["qwen2_5"], tokenizer, chance, fault), law.Violation

        yield make


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
def test_a_planted_fault_is_found(planted: Planted, fault: str, rule: int) -> None:
    bench, violation = planted(fault)
    with pytest.raises(violation) as found:
        while bench.turns < 4000:
            asyncio.run(bench.batch())
    assert found.value.rule == rule


def test_a_violation_ends_the_program(repo: Path, shared: Path) -> None:
    result = run(repo, shared, "--turns", "4000", "--template", "qwen2_5", "--plant", "retokenized")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "VIOLATION of rule 1:" in result.stdout


def test_a_missing_tokenizer_is_said_clearly(repo: Path, shared: Path, tmp_path: Path) -> None:
    result = run(repo, shared, "--tokenizer", str(tmp_path / "nowhere"))
    assert result.returncode == 1
    assert "nowhere" in result.stderr and "--tokenizer" in result.stderr and "Traceback" not in result.stderr
