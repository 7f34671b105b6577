"""The library's own commands; `main.py` is the program, which collects those of every package.

Each file is one command or one group. It imports its dependencies when it is called, so that
`--help` stays fast: `env` and `provenance` (what is installed), `config` (every key), `agents`,
`recipes` and `prepare` (a task's folder and its rows), `template` (proof of a chat template),
`tools` (a test bench of tools), `report`, `trace` (the trajectories of a run).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer


def register(app: typer.Typer) -> None:
    """Add the library's commands to the `agentloop` program."""
    from agentloop.commands.agents import agents
    from agentloop.commands.config import config
    from agentloop.commands.env import env
    from agentloop.commands.prepare import prepare
    from agentloop.commands.recipes import recipes
    from agentloop.commands.report import report
    from agentloop.commands.template import template
    from agentloop.commands.tools import tools
    from agentloop.commands.trace import trace

    app.command("env")(env)
    app.command("config")(config)
    app.command("prepare")(prepare)
    app.command("template")(template)
    app.command("report")(report)
    app.add_typer(agents, name="agents")
    app.add_typer(recipes, name="recipes")
    app.add_typer(tools, name="tools")
    app.add_typer(trace, name="trace")
