"""`python -m rollout_server`: start a server in the environment that holds its engine."""

from __future__ import annotations

import typer

from agentloop.client.open_files import raise_limit
from agentloop.commands.main import run_program
from agentloop.launch.joining import hold_lease
from agentloop.runtime.scan import remember_scans
from rollout_server.commands import serve_command


def main() -> None:
    """Serve. A user error exits with code 2 and a message with the fix."""
    raise_limit()
    remember_scans()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(serve_command())

    def program() -> None:
        hold_lease()
        app()

    run_program(program)


if __name__ == "__main__":
    main()
