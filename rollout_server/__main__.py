"""`python -m rollout_server`: start a server in the environment that holds its engine."""

from __future__ import annotations

import sys

import typer

from agentloop.client.open_files import raise_limit
from agentloop.errors import AgentloopError, UserError
from rollout_server.commands import serve_command


def main() -> None:
    """Serve. A user error exits with code 2 and a message with the fix."""
    raise_limit()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(serve_command())
    try:
        app()
    except AgentloopError as exc:
        print(f"error: {exc}", file=sys.stderr)
        raise SystemExit(2 if isinstance(exc, UserError) else 1) from None


if __name__ == "__main__":
    main()
