"""`agentloop template`: prove that a chat template can carry multi-turn episodes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def template(
    model: Annotated[str, typer.Argument(help="folder with a tokenizer, or a hub id")],
    chat_template: Annotated[
        Path | None, typer.Option("--chat-template", help="Jinja file to try instead of the tokenizer's own")
    ] = None,
    tool_format: Annotated[
        str | None, typer.Option(help="parser of tool calls; detected from the template if not given")
    ] = None,
    tool_role: Annotated[str, typer.Option(help="tool, or user for templates without tools")] = "tool",
    variable: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="a variable of the template, e.g. enable_thinking=false"),
    ] = None,
    tools: Annotated[
        Path | None, typer.Option(help="tool YAML whose schemas are offered; else two built-in ones")
    ] = None,
    conversations: Annotated[int, typer.Option(min=1, max=100_000, help="number of probe conversations")] = 200,
    seed: Annotated[int, typer.Option(help="seed of the probe conversations")] = 0,
) -> None:
    """Prove that a chat template can carry multi-turn episodes; show one as text and ids.

    The verdict is `exact`, `exact with sampled turns kept` (the differences are shown) or `refused`
    (with the reason and what to change; exit code 1).

    Examples:

      agentloop template recipes/quickstart/model

      agentloop template Qwen/Qwen3-8B --set enable_thinking=false

      agentloop template google/gemma-3-4b-it --tool-role user
    """
    from agentloop.commands.template_report import template_command

    raise typer.Exit(
        template_command(
            model,
            chat_template=chat_template,
            tool_format=tool_format,
            tool_role=tool_role,
            variables=variable or [],
            tools=tools,
            count=conversations,
            seed=seed,
        )
    )
