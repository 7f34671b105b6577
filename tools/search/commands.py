"""`agentloop search`: build an index of a corpus, and serve it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from agentloop.errors import ConfigError
from agentloop.text import did_you_mean

KINDS = ("bm25", "flat", "ivf", "hnsw")
FORMULAS = ("lucene", "okapi")

PROGRESS_S = 2.0
"""Seconds between two lines of progress."""


def register(app: typer.Typer) -> None:
    """Add the commands to the `agentloop` program."""
    group = typer.Typer(no_args_is_help=True, help="Build an index of passages, and serve it to the search tool.")
    group.command("index")(index)
    group.command("serve")(serve)
    app.add_typer(group, name="search")


def index(
    corpus: Annotated[Path, typer.Argument(help='JSON lines of passages: {"id": .., "contents": "title\\ntext"}')],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder of the index")],
    kind: Annotated[
        str, typer.Option(help="bm25: by words; flat (exact), ivf, hnsw: by the vectors of --encoder")
    ] = "bm25",
    encoder: Annotated[
        str | None, typer.Option(help="encoder of a dense index: a folder or a hub id, e.g. intfloat/e5-base-v2")
    ] = None,
    pooling: Annotated[str | None, typer.Option(help="mean or cls; default: as the encoder's folder says")] = None,
    device: Annotated[str, typer.Option(help="device of the encoder: cpu, cuda, cuda:1")] = "cpu",
    lists: Annotated[int | None, typer.Option(min=1, help="of ivf; default: 4 x the root of the passages")] = None,
    formula: Annotated[str, typer.Option(help="of bm25: lucene (as Pyserini) or okapi (as rank_bm25)")] = "lucene",
    k1: Annotated[float | None, typer.Option(min=0, help="of bm25; default: 0.9 (lucene), 1.5 (okapi)")] = None,
    b: Annotated[float | None, typer.Option(min=0, max=1, help="of bm25; default: 0.4 (lucene), 0.75 (okapi)")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an index in --out")] = False,
) -> None:
    """Build an index of a corpus. A build that was stopped goes on where it was.

    BM25 needs neither a GPU nor an encoder, and finds less than a dense index: it knows words, not
    meanings.

    Examples:

      agentloop search index wiki-18.jsonl --out wiki-bm25

      agentloop search index wiki-18.jsonl --out wiki-e5 --kind flat --encoder intfloat/e5-base-v2
    """
    from tools.search.index.building import Builder, build_index

    _one_of("--kind", kind, KINDS)
    _one_of("--formula", formula, FORMULAS)
    builder: Builder
    of_dense = {"--encoder": encoder, "--pooling": pooling, "--device": device if device != "cpu" else None}
    of_bm25 = {"--formula": formula if formula != FORMULAS[0] else None, "--k1": k1, "--b": b}
    _refuse_idle(of_dense if kind == "bm25" else of_bm25, f"--kind is {kind}")
    _refuse_idle({"--lists": lists if kind != "ivf" else None}, f"--kind is {kind}")
    if kind == "bm25":
        from tools.search.index.bm25 import Bm25Builder

        builder = Bm25Builder("okapi" if formula == "okapi" else "lucene", k1, b)
    else:
        from tools.search.encoder import Encoder
        from tools.search.index.base import library
        from tools.search.index.dense import DenseBuilder

        if encoder is None:
            raise ConfigError(f"--kind {kind} needs an encoder", "give --encoder, e.g. intfloat/e5-base-v2")
        library("faiss")
        chosen = "ivf" if kind == "ivf" else "hnsw" if kind == "hnsw" else "flat"
        name = str(Path(encoder).absolute()) if Path(encoder).is_dir() else encoder
        builder = DenseBuilder(Encoder(encoder, pooling=pooling, device=device), name, chosen, lists)  # type: ignore[arg-type]

    progress = _Progress()
    made = build_index(corpus, out, builder, force=force, progress=progress)
    typer.echo(f"{made['passages']:,} passages -> {out} in {time.monotonic() - progress.began:.1f} s")


def serve(
    target: Annotated[Path, typer.Argument(help="folder of an index, or a file of faiss such as e5_Flat.index")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to bind; 0: any free one")] = 8000,
    host: Annotated[str, typer.Option(help="address to bind; any but loopback needs a token")] = "127.0.0.1",
    token_file: Annotated[
        Path | None, typer.Option(help="file that holds the token; without it, a new one is made where one is needed")
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="the passages, if they have moved; needed with a file of faiss")
    ] = None,
    topk: Annotated[int, typer.Option(min=1, max=1000, help="passages of a query, if a request does not say")] = 3,
    encoder: Annotated[
        str | None, typer.Option(help="encoder of the queries: a folder or a hub id; default: that of the index")
    ] = None,
    pooling: Annotated[str | None, typer.Option(help="mean or cls; default: as the encoder's folder says")] = None,
    device: Annotated[str, typer.Option(help="device of the encoder: cpu, cuda, cuda:1")] = "cpu",
    gpu: Annotated[bool, typer.Option("--gpu", help="keep the vectors on the GPUs (faiss-gpu)")] = False,
    nprobe: Annotated[int | None, typer.Option(min=1, help="lists of an ivf index that are searched")] = None,
    ef_search: Annotated[int | None, typer.Option(min=1, help="candidates that an hnsw index keeps")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="searches at once of bm25; default: one a core")] = None,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="queries in one batch at most")] = 64,
    cache_queries: Annotated[int, typer.Option(min=0, help="queries whose passages are remembered")] = 100_000,
    cache_mb: Annotated[int, typer.Option(min=0, help="memory for passages that are read often")] = 256,
    verify: Annotated[bool, typer.Option("--verify", help="check every byte of the index before serving")] = False,
) -> None:
    """Serve an index: POST /retrieve {"queries": ["..."], "topk": 3, "return_scores": true}.

    Also /health, and /metrics for Prometheus.

    Examples:

      agentloop search serve wiki-bm25 --port 8000

      agentloop search serve e5_Flat.index --corpus wiki-18.jsonl --encoder intfloat/e5-base-v2
    """
    from tools.search.index.folder import DenseOptions, Opened, open_folder, open_published
    from tools.search.server.serving import serve as run_server

    dense = DenseOptions(encoder, pooling, device, gpu, nprobe, ef_search)

    def open_index() -> Opened:
        if target.is_dir():
            opened = open_folder(target, corpus=corpus, verify=verify, dense=dense)
            of_bm25 = {"--threads": threads if opened.kind != "bm25" else None}
            _refuse_idle(of_bm25, f"{target} is an index of vectors, whose searches use all cores by themselves")
            return opened
        if target.is_file():
            _refuse_idle({"--verify": verify or None}, f"{target} has no checksums")
            _refuse_idle({"--threads": threads}, "its searches use all cores by themselves")
            return open_published(target, corpus, dense)
        raise ConfigError(f"{target} does not exist", "build it with `agentloop search index CORPUS --out DIR`")

    run_server(
        open_index,
        host=host,
        port=port,
        token_file=token_file,
        topk=topk,
        threads=threads or len(os.sched_getaffinity(0)),
        largest_batch=batch,
        cache_queries=cache_queries,
        cache_bytes=cache_mb * 2**20,
        say=typer.echo,
    )


class _Progress:
    """Prints how far a build is, every two seconds."""

    def __init__(self) -> None:
        self.began = self._last = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= PROGRESS_S:
            self._last = now
            typer.echo(f"{what}: {done:,} of {total:,} ({100 * done / max(1, total):.0f} %), {now - self.began:.0f} s")


def _refuse_idle(options: Mapping[str, object], reason: str) -> None:
    """Raise `ConfigError` for an option that is given and would have no effect."""
    for option, value in options.items():
        if value is not None:
            raise ConfigError(f"{option} has no effect: {reason}", "leave it out")


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{option} is {value!r}", did_you_mean(value, known, f"one of: {', '.join(known)}"))
