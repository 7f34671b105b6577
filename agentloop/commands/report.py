"""`agentloop report`: the static page of a run, or one of its plots as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="a run directory, e.g. outputs/quickstart")],
    picture: Annotated[
        Path | None, typer.Option(help="write one plot as an SVG to this file instead, of several runs over each other")
    ] = None,
    plot: Annotated[str, typer.Option(help="title of the plot of --picture, as the page shows it")] = "Reward",
) -> None:
    """Write a run's report.html again, for a finished or a running run."""
    from agentloop.commands.runs import found_runs
    from agentloop.errors import RunDirError
    from agentloop.report import write_report
    from agentloop.text import clean

    for run_dir in run_dirs:
        if not (run_dir / "metrics.jsonl").is_file():
            fix = found_runs("give the directory of a run", beside=run_dir)
            raise RunDirError(f"{clean(run_dir, 300)} has no metrics.jsonl", fix)
    if picture is not None:
        from agentloop.report.picture import write_picture

        typer.echo(str(write_picture(run_dirs, plot, picture)))
        return
    for run_dir in run_dirs:
        typer.echo(str(write_report(run_dir)))
