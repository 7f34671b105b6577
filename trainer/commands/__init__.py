"""`agentloop train`, `eval`, `check`, `sft` and `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[
    Path, typer.Option("--config", "-c", help="the recipe: a YAML file, or a name of `agentloop recipes list`")
]
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
    app.command("export")(export)


def train(config: Config, overrides: Overrides = None, resume: Resume = False, dry_run: DryRun = False) -> None:
    """Train a policy by reinforcement learning as a recipe says.

    Starts the rollout server and the trainer, runs agent loops against them, writes outputs/<run.name>/ with metrics,
    traces, checkpoints and report.html.

    Examples:

      agentloop train --config quickstart

      agentloop train --config recipes/quickstart/recipe.yaml seed=1 run.name=seed1

      agentloop train --config recipes/quickstart/recipe.yaml --resume

    `agentloop config` prints every key with its meaning. Ctrl-C stops cleanly and prints how to go on.
    """
    from trainer.commands.train import train_command

    raise typer.Exit(train_command(config, list(overrides or []), resume=resume, dry_run=dry_run))


def evaluate(
    config: Config,
    overrides: Overrides = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="N|best|last|FOLDER",
            help="a checkpoint of the recipe's run, or the folder of one or of weights; else the recipe's model",
        ),
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
    from trainer.commands.eval import eval_command

    raise typer.Exit(eval_command(config, list(overrides or []), checkpoint=checkpoint, out=out))


def check(
    recipe: Annotated[Path, typer.Argument(help="the recipe: a YAML file, or a name of `agentloop recipes list`")],
    overrides: Overrides = None,
    conversations: Annotated[int, typer.Option(min=1, help="conversations to try the chat template on")] = 200,
) -> None:
    """Check all that a run needs without starting one: recipe, model, tools, reward, rows, and the chat template.

    The template is proven on a battery of conversations: what an episode makes of them, token by token, against the
    template's own rendering. It is `exact`, `exact with sampled turns kept` (what differs is shown), or refused with
    the reason.

    Example: agentloop check recipes/quickstart/recipe.yaml
    """
    from trainer.commands.check import check_command

    raise typer.Exit(check_command(recipe, list(overrides or []), conversations=conversations))


def sft(config: Config, overrides: Overrides = None, resume: Resume = False, dry_run: DryRun = False) -> None:
    """Fine-tune a model on conversations with tool calls: loss on the assistant's turns, in the stages of a recipe.

    Rows are {messages, tools} or {text}, in .jsonl or .parquet files. What is trained are the ids that the model has to
    sample in a rollout of the conversation. Writes outputs/<run.name>/ with metrics, checkpoints and the finished
    model, which `agentloop serve` and a training recipe take.

    Examples:

      agentloop sft --config recipes/quickstart/sft.yaml

      agentloop sft --config sft.yaml stages.0.epochs=3 max_tokens=4096 overlong=drop

      agentloop sft --config sft.yaml --resume

    `agentloop config --sft` prints every key with its meaning, docs/sft.md explains data of your own. Ctrl-C saves and
    prints how to go on.
    """
    from trainer.commands.sft import sft_command

    raise typer.Exit(sft_command(config, list(overrides or []), resume=resume, dry_run=dry_run))


def export(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_DIR|CHECKPOINT", help="outputs/<name>, or a step_N folder in it")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="the folder to write")],
    step: Annotated[
        str | None, typer.Option(metavar="N|best|last", help="which checkpoint of the run; last if not given")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="bfloat16|float32", help="of the weights; the run's model.dtype if not given")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="the model that the run started from, if it lies elsewhere by now; a hub id too")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace a model that is in --out already")] = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder: weights, configuration, tokenizer and chat template.

    The folder is what transformers, SGLang, vLLM and `agentloop serve` load. It holds safetensors, in files of 4 GB
    with an index when there are more than one, and it appears under its name when it is whole. Checkpoints of any
    number of ranks are read in one process, on the CPU, one tensor at a time: memory does not depend on the model's
    size.

    `best` is the checkpoint whose evaluation had the highest reward (of `agentloop sft`: the lowest loss), among those
    that the run has kept.

    Examples:

      agentloop export outputs/quickstart --out my-model

      agentloop export outputs/quickstart --step best --dtype bfloat16 --out my-model

      agentloop export outputs/quickstart/checkpoints/step_40 --out my-model

    Then: agentloop serve --model my-model
    """
    from trainer.commands.export import export_command

    raise typer.Exit(export_command(source, out, step=step, dtype=dtype, model=model, force=force))
