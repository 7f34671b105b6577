"""`agentloop trace` lists its commands and stays cheap to import."""

from __future__ import annotations

import subprocess
import sys

from typer.testing import CliRunner

from agentloop.commands.main import build_app

HEAVY = ("numpy", "pyarrow", "torch", "transformers", "fastapi", "weave", "opentelemetry")


def test_the_group_says_what_it_is_for() -> None:
    shown = CliRunner().invoke(build_app(), ["trace", "--help"])
    assert shown.exit_code == 0
    assert "trajectories of a run" in shown.output


def test_registering_the_commands_imports_nothing_heavy() -> None:
    code = f"import sys, agentloop.commands.trace; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
