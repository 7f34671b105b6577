"""`python -m rollout_server`: how a run starts its server, by name, in whatever environment holds the engine."""

from __future__ import annotations

import sys

import typer

from agentloop.errors import AgentloopError, UserError
from rollout_server.commands import serve


def main() -> None:
    """Serve. Errors that a user made exit with 2 and a line that says what to do."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(serve)
    try:
        app()
    except AgentloopError as exc:
        print(f"error: {exc}", file=sys.stderr)
        raise SystemExit(2 if isinstance(exc, UserError) else 1) from None


if __name__ == "__main__":
    main()
