"""Options of the program itself."""

from __future__ import annotations

from typer.testing import CliRunner

from agentloop import __version__
from agentloop.commands.main import build_app


def test_the_version_is_printed_without_a_command() -> None:
    result = CliRunner().invoke(build_app(), ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"agentloop {__version__}\n")


def test_the_help_says_how_to_begin_and_lists_the_options() -> None:
    shown = CliRunner().invoke(build_app(), ["--help"]).stdout
    assert "First steps" in shown and "--version" in shown
