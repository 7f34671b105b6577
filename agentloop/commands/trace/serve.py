"""`agentloop trace serve`: the viewer, and a server that other programs send traces to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(help="run directories, or folders of them; one without a run yet is fine (default: outputs)"),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to bind; 0: any free one")] = 8777,
    host: Annotated[str, typer.Option(help="address to bind; any but loopback needs a token")] = "127.0.0.1",
    token_file: Annotated[
        Path | None, typer.Option(help="file that holds the token; without it, a new one is made where one is needed")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="folder of traces that other programs send (default: .agentloop-traces beside the runs)"),
    ] = None,
) -> None:
    """Serve the viewer of runs; weave and OpenTelemetry clients can send traces to it.

    No account and no network are needed. It prints the variables that let an unmodified weave
    client use it as its backend.
    """
    from agentloop.viewer.serving import serve as run_server

    folders = [_served(folder) for folder in runs or [Path("outputs")]]
    run_server(folders, host=host, port=port, token_file=token_file, data=data, say=typer.echo)


def _served(folder: Path) -> Path:
    """Return the folder to serve: of a part of a run, the run.

    Raises:
        TraceError: it is a file outside of runs.
    """
    from agentloop.commands.runs import check_is_run, is_run, run_above
    from agentloop.files import is_dir, is_file
    from agentloop.text import clean

    if is_run(folder) or not (is_dir(folder) or is_file(folder)):
        return folder  # one that does not exist is waited for
    above = run_above(folder)
    if above is not None:
        typer.echo(f"{clean(folder, 300)} is inside the run {clean(above, 300)}, which is served")
        return above
    if is_file(folder):
        check_is_run(folder)
    return folder
