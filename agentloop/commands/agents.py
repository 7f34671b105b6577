"""`agentloop agents`: the agent loops that are installed."""

from __future__ import annotations

import typer

agents = typer.Typer(help="Agent loops that a row's `agent_name` can choose.", no_args_is_help=True)


@agents.callback()
def _group() -> None:
    """Agent loops that a row's `agent_name` can choose."""


@agents.command("list")
def list_command() -> None:
    """List the installed agent loops, and where each comes from."""
    from agentloop.agent.loading import list_agents

    for name, origin, summary in list_agents():
        typer.echo(f"{name:24} {origin:48} {summary}")
