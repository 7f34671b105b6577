"""`agentloop report`: the static page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(run_dir: Annotated[Path, typer.Argument(help="a run directory, e.g. outputs/quickstart")]) -> None:
    """Write a run's report.html again, for a finished or a running run."""
    from agentloop.errors import RunDirError
    from agentloop.report import write_report

    if not (run_dir / "metrics.jsonl").is_file():
        raise RunDirError(f"{run_dir} has no metrics.jsonl", "give the directory of a run")
    typer.echo(str(write_report(run_dir)))
