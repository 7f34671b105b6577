"""`agentloop config`: every key of a recipe."""

from __future__ import annotations

from typing import Annotated

import typer


def config(
    section: Annotated[str | None, typer.Argument(help="only keys that start with this, e.g. rollout")] = None,
    sft: Annotated[bool, typer.Option("--sft", help="keys of an SFT recipe instead")] = False,
) -> None:
    """Print every key of a recipe with its default and its meaning."""
    from agentloop.config import Recipe, SftRecipe
    from agentloop.config.docs import describe

    for line in describe(SftRecipe if sft else Recipe, section or ""):
        typer.echo(line)
