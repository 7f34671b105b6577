"""Options of the program itself."""

from __future__ import annotations

import subprocess
import sys

from typer.testing import CliRunner

from agentloop import __version__
from agentloop.commands.main import build_app


def test_the_version_is_printed_without_a_command() -> None:
    result = CliRunner().invoke(build_app(), ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"agentloop {__version__}\n")


def test_the_help_says_how_to_begin_and_lists_the_options() -> None:
    shown = CliRunner().invoke(build_app(), ["--help"]).stdout
    assert "First steps" in shown and "--version" in shown


def test_the_program_imports_little_before_it_starts_the_process_that_imports_torch() -> None:
    late = {"typer", "asyncio", "importlib.metadata", "pydantic", "yaml", "numpy"}
    code = f"import sys, agentloop.commands.main; print(*{late!r} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "\n"
