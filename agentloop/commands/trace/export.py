"""`agentloop trace export`: episodes in the forms that other programs read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from agentloop.trace.export import ExportRun

STDOUT = Path("-")


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, e.g. outputs/quickstart")],
    format: Annotated[
        Literal["jsonl", "parquet", "atif", "messages", "sft"],
        typer.Option(help="jsonl, parquet: everything; atif: ATIF v1.7; messages: chats; sft: for `agentloop sft`"),
    ],
    out: Annotated[Path, typer.Option(help="file to write, with a suffix that fits the format; -: standard output")],
    step: Annotated[str | None, typer.Option(help="a step, or several: 3-9")] = None,
    split: Annotated[Literal["train", "eval", "all"], typer.Option(help="train, eval or all")] = "train",
    status: Annotated[
        Literal["ok", "failed", "rejected", "all"] | None,
        typer.Option(help="ok, failed, rejected or all; default: ok for messages and sft, else all"),
    ] = None,
    min_reward: Annotated[float | None, typer.Option(help="least reward")] = None,
    max_reward: Annotated[float | None, typer.Option(help="largest reward")] = None,
    task: Annotated[str | None, typer.Option(help="episodes of this task_id")] = None,
    search: Annotated[str | None, typer.Option(help="text in messages, answers or errors; case is ignored")] = None,
    key: Annotated[list[str] | None, typer.Option(help="only this episode; may be repeated")] = None,
    best_of_group: Annotated[
        bool, typer.Option("--best-of-group", help="of each group only the episode with the highest reward")
    ] = False,
    limit: Annotated[int, typer.Option(min=0, help="most episodes, the first ones; 0: all")] = 0,
    tools: Annotated[Path | None, typer.Option(help="tool YAML; default: the run's own")] = None,
    no_tools: Annotated[bool, typer.Option("--no-tools", help="write no tool schemas")] = False,
    no_token_ids: Annotated[bool, typer.Option("--no-token-ids", help="atif: without token ids and logprobs")] = False,
    force: Annotated[bool, typer.Option("--force", help="replace the file if it exists")] = False,
) -> None:
    """Export episodes: everything (jsonl, parquet), or what another program reads.

    Rejection sampling: keep what was rewarded, and fine-tune on it.

      agentloop trace export outputs/quickstart --format sft --min-reward 1 --out good.jsonl
    """
    from agentloop import __version__
    from agentloop.commands.trace.output import SUFFIXES, check_out
    from agentloop.commands.trace.printing import progress
    from agentloop.commands.trace.reading import Reading, find_episode, main_key, say_problems
    from agentloop.commands.trace.settings import read_config, setting, tool_schemas
    from agentloop.errors import TraceError
    from agentloop.trace.export import Selection
    from agentloop.trace.export import export as write
    from agentloop.trace.export.atif import AtifRun
    from agentloop.trace.export.selection import best_of_groups, key_of

    if out != STDOUT:
        check_out(out, SUFFIXES[format], f"--format {format}", force=force)
    if status is None:
        status = "ok" if format in ("messages", "sft") else "all"

    reading = Reading(run, step, split)
    if key:
        chosen = [main_key(find_episode(reading.store, each)) for each in key]
        reading = Reading(run)
    else:
        table = reading.select(Selection(None if status == "all" else status, min_reward, max_reward, task, search))
        if best_of_group:
            table = best_of_groups(table)
        chosen = [key_of(row) for row in table.slice(0, limit or len(table)).to_pylist()]
    if not chosen and out != STDOUT:
        say_problems(reading.problems())
        raise TraceError("no episode matches: nothing is written", "loosen the filters; see `agentloop trace list`")

    config = read_config(run)
    schemas: list[dict[str, Any]] = []
    if format in ("atif", "messages", "sft") and not no_tools:
        schemas = tool_schemas(config, tools)
    about = AtifRun(
        name=str(setting(config, "run.name") or run.resolve().name),
        model=setting(config, "model.path"),
        version=__version__,
        tools=schemas,
        token_ids=not no_token_ids,
    )
    with progress(len(chosen), "episodes") as advance:
        done = write(
            reading.episodes(chosen),
            format,
            out if out != STDOUT else sys.stdout.buffer,
            about,
            on_episode=advance,
        )
    _say(done, out)
    say_problems(reading.problems())


def _say(done: ExportRun, out: Path) -> None:
    """Print what was written to standard error: standard output may be the export itself."""
    from agentloop.text import clean, counted

    where = "standard output" if out == STDOUT else clean(out, 300)
    typer.echo(f"{where}: {counted(done.rows, 'row')} of {counted(done.episodes, 'episode')}", err=True)
    for reason, count in done.skipped.most_common():
        typer.echo(f"left out, {clean(reason)}: {count:,}", err=True)
