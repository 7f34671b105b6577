"""`agentloop trace push`: send the episodes of a run to weave or an OpenTelemetry receiver."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXIT_INTERRUPTED = 130


def push(
    run: Annotated[Path, typer.Argument(help="run directory")],
    to: Annotated[str, typer.Option(help="otlp, weave, or a name of trace.exporters")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(help="key=value of the destination's section, e.g. endpoint=http://127.0.0.1:4318"),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="all groups, not only those that sample_rate and max_groups_per_step choose")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="also what was sent before: for a receiver that lost what it had confirmed")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="while no connection can be made, try again each minute, until Ctrl-C")
    ] = False,
) -> None:
    """Send the episodes that a destination does not have yet, each once.

    It can be interrupted and repeated, also while the run goes on. What was sent is noted in
    RUN/traces/exports.sqlite. While the destination does not answer, a batch is tried again after
    1, 3 and 10 s; then the command ends with 1.
    """
    import logging

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from agentloop.commands.runs import check_is_run
    from agentloop.errors import DiskError, ExportError
    from agentloop.text import clean, counted
    from agentloop.trace.push import BUILT_IN, Push, push_destination
    from agentloop.trace.sender.memory import bound_memory

    check_is_run(run)
    destination, of = push_destination(to, run, changes or ())
    # Its messages would be printed between those of this command, which names each failure itself.
    logging.getLogger("weave").addHandler(logging.NullHandler())
    screen = Console(stderr=True, highlight=False, markup=False)
    work = Push(destination, of, everything=everything, again=again, wait=wait, warn=screen.print)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    interrupted = False
    # What the exporters of other packages need is not known.
    unbound = bound_memory() if to in BUILT_IN else lambda: None
    try:
        total = work.count()
        with Progress(*columns, console=screen, disable=not screen.is_terminal) as progress:
            bar = progress.add_task(f"to {to}", total=total)
            for settled in work.send():
                progress.advance(bar, settled)
    except KeyboardInterrupt:
        interrupted = True
    except (DiskError, ExportError) as exc:
        exc.message += f" ({work.done.sent:,} episodes were sent; repeat the command to send the others)"
        raise
    finally:
        work.close()
        unbound()

    done = work.done
    typer.echo(f"{destination.exporter.destination}: {counted(done.sent, 'episode')} sent, {done.known:,} were there")
    if done.without_spans:
        typer.echo(f"not sent, because an older version wrote no spans: {counted(done.without_spans, 'episode')}")
    for text in done.unread:
        typer.echo(f"left out: {clean(text, 600)}", err=True)
    if done.refused:
        typer.echo(
            f"{counted(len(done.refused), 'episode')} refused, the first: {clean(done.refused[0], 600)}", err=True
        )
    if interrupted:
        typer.echo("stopped: repeat the command to send the others", err=True)
        raise typer.Exit(EXIT_INTERRUPTED)
    if done.refused or done.unread:
        raise typer.Exit(1)
