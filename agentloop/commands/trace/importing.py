"""`agentloop trace import`: convert the traces of earlier versions to parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_old(
    run: Annotated[Path, typer.Argument(help="run directory, e.g. outputs/quickstart")],
    delete: Annotated[
        bool, typer.Option("--delete", help="delete each JSON file whose lines are all in the parquet file")
    ] = False,
) -> None:
    """Convert traces that earlier versions wrote as JSON lines (`traces/step_N/train.jsonl`).

    Each file is converted whole or not at all, so that a stopped import can be repeated; files that
    are converted already are skipped. Every command reads the old form too, only more slowly.
    """
    from agentloop.commands.runs import check_is_run
    from agentloop.text import clean, counted
    from agentloop.trace.store import TraceStore
    from agentloop.trace.store.old_form import convert, old_files

    check_is_run(run)
    store = TraceStore(run)
    files = old_files(store.folder)
    if not files:
        typer.echo(f"{clean(str(store.folder), 300)} has no traces in the old form")
        return

    before = after = unread = 0
    for file in files:
        done = convert(store, file)
        name = clean(str(file.path.relative_to(store.folder)), 300)
        if not done.size:
            unread += 1
            typer.echo(f"{name}: none of its {done.lost:,} lines holds a trajectory; it is not converted", err=True)
            continue
        before, after = before + file.path.stat().st_size, after + done.size
        verb = "converted already" if done.skipped else f"{done.trajectories:,} trajectories"
        lost = f"; {done.lost:,} lines hold no trajectory and are left out" if done.lost else ""
        typer.echo(f"{name}: {verb}{lost}")
        if delete and not done.lost:
            file.path.unlink()
    converted = counted(len(files) - unread, "file")
    typer.echo(f"{converted}: {before / 1e6:,.1f} MB of JSON lines are {after / 1e6:,.1f} MB of parquet")
    if not delete:
        typer.echo("the JSON files are kept; --delete removes those that are converted")
    if unread:
        raise typer.Exit(1)
