"""`agentloop train`, `agentloop eval`, `agentloop check` and `agentloop sft`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path, typer.Option("--config", "-c", help="the recipe, a YAML file")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="change keys of the recipe, e.g. run.steps=10 seed=1"),
]
Resume = Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint of this run's directory")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the resolved configuration and stop")]


def register(app: typer.Typer) -> None:
    """Add the trainer's commands to the `agentloop` program."""
    app.command("train")(train)
    app.command("eval")(evaluate)
    app.command("check")(check)
    app.command("sft")(sft)


def train(config: Config, overrides: Overrides = None, resume: Resume = False, dry_run: DryRun = False) -> None:
    """Train a policy by reinforcement learning as a recipe says.

    Starts the rollout server and the trainer, runs agent loops against them, writes outputs/<run.name>/ with metrics,
    traces, checkpoints and report.html.

    Examples:

      agentloop train --config recipes/quickstart/recipe.yaml

      agentloop train --config recipes/quickstart/recipe.yaml seed=1 run.name=seed1

      agentloop train --config recipes/quickstart/recipe.yaml --resume

    `agentloop config` prints every key with its meaning. Ctrl-C stops cleanly and prints how to go on.
    """
    from trainer.train_command import train_command

    raise typer.Exit(train_command(config, list(overrides or []), resume=resume, dry_run=dry_run))


def evaluate(
    config: Config,
    overrides: Overrides = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(help="a step of the recipe's run, a checkpoint's folder, or a model's; else the recipe's model"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="where to write; else <run directory>/evaluations/<what was evaluated>")
    ] = None,
) -> None:
    """Evaluate a model or a checkpoint on data.val, with the recipe's agent loops; nothing is trained.

    Prints a table with a line for each data source, and writes eval.json and a trace.

    Examples:

      agentloop eval --config recipes/quickstart/recipe.yaml eval.max_rows=64

      agentloop eval --config recipes/quickstart/recipe.yaml --checkpoint 60 eval.n=8 eval.sampling.temperature=1
    """
    from trainer.eval_command import eval_command

    raise typer.Exit(eval_command(config, list(overrides or []), checkpoint=checkpoint, out=out))


def check(
    recipe: Annotated[Path, typer.Argument(help="the recipe, a YAML file")],
    overrides: Overrides = None,
    conversations: Annotated[int, typer.Option(min=1, help="conversations to try the chat template on")] = 200,
) -> None:
    """Check all that a run needs without starting one: recipe, model, tools, reward, rows, and the chat template.

    The template is proven on a battery of conversations: what an episode makes of them, token by token, against the
    template's own rendering. It is `exact`, `exact with sampled turns kept` (what differs is shown), or refused with
    the reason.

    Example: agentloop check recipes/quickstart/recipe.yaml
    """
    from trainer.check_command import check_command

    raise typer.Exit(check_command(recipe, list(overrides or []), conversations=conversations))


def sft(config: Config, overrides: Overrides = None, resume: Resume = False, dry_run: DryRun = False) -> None:
    """Fine-tune a model on conversations: loss on assistant turns, in the stages of a recipe.

    Example: agentloop sft --config recipes/quickstart/sft.yaml
    """
    from trainer.sft_command import sft_command

    raise typer.Exit(sft_command(config, list(overrides or []), resume=resume, dry_run=dry_run))
