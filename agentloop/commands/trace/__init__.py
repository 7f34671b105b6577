"""`agentloop trace`: every trajectory of a run, in the terminal, in a viewer, and elsewhere.

Each file is one command and imports its dependencies when it is called. To add a command, import
its function in `add_commands` and register it there, one line each.
"""

from __future__ import annotations

import typer

trace = typer.Typer(
    help="Read the trajectories of a run: list them, compare them, export them, score them again.",
    no_args_is_help=True,
)


def add_commands(group: typer.Typer) -> None:
    """Register every command of the group, in the order in which `--help` shows them."""
    from agentloop.commands.trace.diff import diff
    from agentloop.commands.trace.export import export
    from agentloop.commands.trace.importing import import_old
    from agentloop.commands.trace.list import list_episodes
    from agentloop.commands.trace.push import push
    from agentloop.commands.trace.rescore import rescore
    from agentloop.commands.trace.serve import serve
    from agentloop.commands.trace.show import show

    group.command("list")(list_episodes)
    group.command("show")(show)
    group.command("diff")(diff)
    group.command("export")(export)
    group.command("rescore")(rescore)
    group.command("import")(import_old)
    group.command("serve")(serve)
    group.command("push")(push)


add_commands(trace)
