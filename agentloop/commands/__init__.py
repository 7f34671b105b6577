"""Commands of the library itself: what is installed, what can be configured, data, reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the library's commands to the `agentloop` program."""
    app.command("env")(env)
    app.command("config")(config)
    app.command("report")(report)
    app.command("template")(template)
    agents = typer.Typer(help="Agent loops that a row's `agent_name` can choose.", no_args_is_help=True)
    agents.command("list")(agents_list)
    app.add_typer(agents, name="agents")
    prepare = typer.Typer(
        help="Turn public data sets into rows with prompt, tools and ground truth.", no_args_is_help=True
    )
    prepare.command("gsm8k")(prepare_gsm8k_command)
    app.add_typer(prepare, name="prepare")


def env(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Show versions, and from where each of the four packages is imported.

    `trainer` and `tools` are common names: a folder of that name in the working directory would be imported instead.
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


def config(
    section: Annotated[str | None, typer.Argument(help="only keys that start with this, e.g. rollout")] = None,
    sft: Annotated[bool, typer.Option("--sft", help="keys of an SFT recipe instead")] = False,
) -> None:
    """Print every key of a recipe with its default and what it means."""
    from agentloop.config import Recipe, SftRecipe
    from agentloop.config.docs import describe

    for line in describe(SftRecipe if sft else Recipe, section or ""):
        typer.echo(line)


def agents_list() -> None:
    """List the agent loops that are installed, and where each comes from."""
    from agentloop.agent.loading import list_agents

    for name, origin, summary in list_agents():
        typer.echo(f"{name:24} {origin:48} {summary}")


def prepare_gsm8k_command(
    source: Annotated[str, typer.Option(help="folder with train.jsonl and test.jsonl, or a hub id (openai/gsm8k)")],
    out: Annotated[Path, typer.Option(help="folder for train.parquet and test.parquet")],
) -> None:
    """Write gsm8k as multi-turn tool rows: `calc_gsm8k_reward` offered, answer after `####`."""
    from agentloop.prepare import prepare_gsm8k

    for split, count in prepare_gsm8k(source, out).items():
        typer.echo(f"{split:6} {count:6} rows -> {out / split}.parquet")


def template(
    model: Annotated[str, typer.Argument(help="folder with a tokenizer, or a hub id")],
    chat_template: Annotated[
        Path | None, typer.Option("--chat-template", help="Jinja file to try instead of the tokenizer's own")
    ] = None,
    tool_format: Annotated[
        str | None, typer.Option(help="parser of tool calls; found from the template if not given")
    ] = None,
    tool_role: Annotated[str, typer.Option(help="tool, or user for templates without tools")] = "tool",
    variable: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="a variable of the template, e.g. enable_thinking=false"),
    ] = None,
    tools: Annotated[
        Path | None, typer.Option(help="tool YAML whose schemas are offered; else two of the battery's")
    ] = None,
    conversations: Annotated[int, typer.Option(min=1, help="conversations to try")] = 200,
    seed: Annotated[int, typer.Option(help="of the battery")] = 0,
) -> None:
    """Prove that a chat template can carry multi-turn episodes, and show one, text and ids side by side.

    Says `exact`, `exact with sampled turns kept` (what differs is shown) or `refused` (why, and what to change; exit
    code 1).

    Examples:

      agentloop template recipes/quickstart/model

      agentloop template Qwen/Qwen3-8B --set enable_thinking=false

      agentloop template google/gemma-3-4b-it --tool-role user
    """
    from agentloop.commands.template import template_command

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


def report(run_dir: Annotated[Path, typer.Argument(help="a run directory, e.g. outputs/quickstart")]) -> None:
    """Write report.html of a run again (it is written at the end of every run)."""
    from agentloop.errors import RunDirError
    from agentloop.report import write_report

    if not (run_dir / "metrics.jsonl").is_file():
        raise RunDirError(f"{run_dir} holds no metrics.jsonl", "give the directory of a run")
    typer.echo(str(write_report(run_dir)))
