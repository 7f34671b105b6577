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

    folders = runs or [Path("outputs")]
    run_server(folders, host=host, port=port, token_file=token_file, data=data, say=typer.echo)
