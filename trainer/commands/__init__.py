"""The trainer's commands: `agentloop train`, `eval`, `check`, `sft`, `export` and `cluster`.

This file holds the options and help texts; each other file is one command, imported when it runs.
The functions are not named like the files: an imported file would replace a function of its name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[
    Path | None, typer.Option("--config", "-c", help="the recipe: a YAML file, or a name of `agentloop recipes list`")
]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [KEY=VALUE]...",
        help="the recipe, unless --config names it; and changes of its keys, e.g. run.steps=10 seed=1",
        show_default=False,
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="continue from the newest checkpoint in the run directory")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the resolved configuration and stop")]


def register(app: typer.Typer) -> None:
    """Add the trainer's commands to the `agentloop` program."""
    app.command("train")(train_options)
    app.command("eval")(eval_options)
    app.command("check")(check_options)
    app.command("sft")(sft_options)
    app.command("export")(export_options)
    app.add_typer(_cluster_app(), name="cluster")


def train_options(words: Words = None, config: Config = None, resume: Resume = False, dry_run: DryRun = False) -> None:
    """Train a policy by reinforcement learning, as configured in a recipe.

    Starts the rollout server and the trainer, runs agent loops against them, and writes
    outputs/<run.name>/ with metrics, traces, checkpoints and report.html.

    Examples:

      agentloop train quickstart

      agentloop train my-recipe/recipe.yaml seed=1 run.name=seed1

      agentloop train --config my-recipe/recipe.yaml --resume

    `agentloop config` prints every key with its meaning. Ctrl-C saves a checkpoint and prints the
    command that continues the run.
    """
    from agentloop.commands.recipes import recipe_and_overrides
    from trainer.commands.train import train_command

    recipe, overrides = recipe_and_overrides(words, config)
    raise typer.Exit(train_command(recipe, overrides, resume=resume, dry_run=dry_run))


def eval_options(
    words: Words = None,
    config: Config = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="N|best|last|FOLDER",
            help="a checkpoint of the recipe's run, or a folder of a checkpoint or of weights; default: its model",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder to write to; default: <run directory>/evaluations/<name>")
    ] = None,
) -> None:
    """Evaluate a model or a checkpoint on data.val with the recipe's agent loops. Trains nothing.

    Prints a table with one line per data source, and writes eval.json and a trace.

    Examples:

      agentloop eval --config quickstart eval.max_rows=64

      agentloop eval --config quickstart --checkpoint 60 eval.n=8 eval.sampling.temperature=1
    """
    from agentloop.commands.recipes import recipe_and_overrides
    from trainer.commands.eval import eval_command

    recipe, overrides = recipe_and_overrides(words, config)
    raise typer.Exit(eval_command(recipe, overrides, checkpoint=checkpoint, out=out))


def check_options(
    words: Words = None,
    config: Config = None,
    conversations: Annotated[int, typer.Option(min=1, max=100_000, help="probe conversations of the template")] = 200,
    offline: Annotated[
        bool, typer.Option("--offline", help="all but the weights, and nothing over the network")
    ] = False,
) -> None:
    """Check a run without starting it: recipe, model, tools, reward, rows, chat template.

    The chat template is proven on probe conversations: the tokens of an episode are compared with
    the template's own rendering. The verdict is `exact`, `exact with sampled turns kept` (the
    differences are shown), or refused with the reason.

    A recipe of `agentloop sft` is checked too: model, tokenizer, template, and every row.

    Examples:

      agentloop check quickstart

      agentloop check my-recipe/sft.yaml

      agentloop check gsm8k --offline
    """
    if offline:  # read by huggingface_hub, and by the libraries above it, when they are imported
        os.environ["HF_HUB_OFFLINE"] = "1"
    from agentloop.commands.recipes import recipe_and_overrides
    from trainer.commands.check import check_command

    recipe, overrides = recipe_and_overrides(words, config)
    raise typer.Exit(check_command(recipe, overrides, conversations=conversations, offline=offline))


def sft_options(words: Words = None, config: Config = None, resume: Resume = False, dry_run: DryRun = False) -> None:
    """Fine-tune a model on conversations with tool calls. The loss is on the assistant's turns.

    Rows are {messages, tools} or {text}, in .jsonl or .parquet files. The trained ids are those
    that a rollout of the conversation would sample. Writes outputs/<run.name>/ with metrics,
    checkpoints and the finished model, which `agentloop serve` and a training recipe can load.

    Examples:

      agentloop sft --config quickstart

      agentloop sft --config sft.yaml stages.0.epochs=3 max_tokens=4096 overlong=drop

      agentloop sft --config sft.yaml --resume

    `agentloop config --sft` prints every key with its meaning; docs/sft.md explains the format of
    the data. Ctrl-C saves a checkpoint and prints the command that continues the run.
    """
    from agentloop.commands.recipes import recipe_and_overrides
    from trainer.commands.sft import sft_command

    recipe, overrides = recipe_and_overrides(words, config)
    raise typer.Exit(sft_command(recipe, overrides, resume=resume, dry_run=dry_run))


def export_options(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_DIR|CHECKPOINT", help="outputs/<name>, or a step_N folder in it")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="the folder to write")],
    step: Annotated[
        str | None, typer.Option(metavar="N|best|last", help="checkpoint of the run; default: last")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="bfloat16|float32", help="of the weights; default: the run's model.dtype"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="the model that the run started from, if it has moved: a folder or a hub id")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an existing model in --out")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="as model.trust_remote_code of a recipe; default: the run's")
    ] = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder: weights, config, tokenizer, chat template.

    transformers, SGLang, vLLM and `agentloop serve` load such a folder. The weights are
    safetensors, in files of 4 GB at most. The folder appears under its name when it is complete.
    Checkpoints of any number of ranks are read in one process, on the CPU, one tensor at a time, so
    memory does not grow with the model.

    `best` is the checkpoint with the highest evaluation reward (for `agentloop sft`: the lowest
    loss) among those that the run has kept.

    Examples:

      agentloop export outputs/quickstart --out my-model

      agentloop export outputs/quickstart --step best --dtype bfloat16 --out my-model

      agentloop export outputs/quickstart/checkpoints/step_40 --out my-model

    Then: agentloop serve --model my-model
    """
    from trainer.commands.export import export_command

    code = export_command(
        source, out, step=step, dtype=dtype, model=model, force=force, trust_remote_code=trust_remote_code
    )
    raise typer.Exit(code)


RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="directory of a run that is going on: outputs/<name>")]


def _cluster_app() -> typer.Typer:
    """The commands of `agentloop cluster`."""
    app = typer.Typer(help="Look at a run that is going on, and change its number of processes.", no_args_is_help=True)
    app.command("status")(cluster_status_options)
    app.command("scale")(cluster_scale_options)
    return app


def cluster_status_options(run: RunFolder) -> None:
    """Show the progress of a run, and the state of its replicas and agent workers.

    Example: agentloop cluster status outputs/quickstart
    """
    from trainer.commands.cluster import status_command

    status_command(run)


def cluster_scale_options(
    run: RunFolder,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="PART=NUMBER...",
            help="rollout=6: replicas of the rollout server; agents=4: agent workers",
            show_default=False,
        ),
    ],
) -> None:
    """Change how many replicas or agent workers a run has, while it goes on.

    A replica that joins loads the current version first. The requests of one that leaves go on in
    the others, with the tokens that they have. What a step holds does not depend on the numbers.
    The run must have been started with two replicas or more, or with agent workers. A resumed run
    has the numbers of its recipe again.

    Example: agentloop cluster scale outputs/quickstart rollout=4 agents=2
    """  # fmt: skip
    from trainer.commands.cluster import scale_command

    scale_command(run, words)
