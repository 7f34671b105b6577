"""`agentloop env`: versions, and where each package is imported from."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def env(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Show versions, and where each of agentloop's packages is imported from.

    `trainer`, `tools` and `recipes` are common names: a package of that name on PYTHONPATH would be
    imported instead.
    """
    from agentloop.commands.provenance import environment, package_origins

    data = environment()
    if as_json:
        typer.echo(json.dumps(data, indent=2))
    else:
        for key, value in data.items():
            if key not in ("versions", "packages", "argv"):
                typer.echo(f"{key:15} {value}")
        for name, version in data["versions"].items():
            typer.echo(f"{name:15} {version}")
        for origin in package_origins():
            note = "" if origin.ours else "   <-- NOT agentloop's: commands will refuse to start"
            typer.echo(f"{origin.name:15} {origin.path or 'not found'}{note}")

    if not all(origin.ours for origin in package_origins()):
        raise typer.Exit(2)
