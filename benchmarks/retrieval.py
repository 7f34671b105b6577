"""The retrieval server over a million generated passages: build, memory, queries a second, and what BM25 finds.

    python benchmarks/retrieval.py [--passages 1000000] [--quick]

`bm25`: time and peak memory of `agentloop search index`; queries a second, p50 and p99 of 64 clients against
`agentloop search serve` without its cache of queries; the share of the ten best passages by rank_bm25's formula,
computed here a second time word by word, that it finds; the event loop of 4,096 episodes that search at once through
the tool. `flat`: faiss over given vectors.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
from quick import QUICK, add_quick_option, expect, expect_between
from report import hardware, record, table

from agentloop.client.connections import ConnectionPool
from agentloop.runtime.event_loop import run_loops
from agentloop.runtime.lag import LoopLagMonitor
from agentloop.runtime.pacing import Pacer
from agentloop.tool.session import Toolset
from agentloop.types import Task, ToolCall
from tools.search import SearchTool
from tools.search.index.bm25 import DEFAULTS, OKAPI_FLOOR, Bm25Index, words_of

VOCABULARY = 200_000
WORDS = (40, 120)
QUERY_WORDS = (2, 6)
TOP = 10
CLIENTS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--size", type=int, default=384, help="numbers of a vector")
    parser.add_argument("--requests", type=int, default=4000, help="of all clients together")
    parser.add_argument("--queries", type=int, default=1000, help="whose ten best passages are compared")
    parser.add_argument("--episodes", type=int, default=4096, help="that search at once")
    parser.add_argument("--only", choices=("bm25", "flat"), help="one of the two")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--record", action="store_true", help="add a section to RESULTS.md")
    parser.add_argument("--serve-vectors", nargs=3, metavar=("VECTORS", "CORPUS", "PORT"), help=argparse.SUPPRESS)
    add_quick_option(parser)
    arguments = parser.parse_args()
    if arguments.serve_vectors:
        serve_vectors(*arguments.serve_vectors)
        return
    if arguments.quick:
        arguments.passages, arguments.size, arguments.requests, arguments.queries = 2000, 16, 200, 50
        arguments.episodes = 256

    machine, results = hardware(), {}
    with tempfile.TemporaryDirectory(prefix="retrieval-") as name:
        folder = Path(name)
        corpus = folder / "corpus.jsonl"
        write_corpus(corpus, arguments.passages)
        if arguments.only != "flat":
            results["bm25"] = bm25(folder, corpus, arguments)
        if arguments.only != "bm25":
            results["flat"] = flat(folder, corpus, arguments)
    print(machine)
    keys = list(dict.fromkeys(key for result in results.values() for key in result))
    rows = [[key, *(f"{result[key]:,.4g}" if key in result else "" for result in results.values())] for key in keys]
    lines = table([["", *results], *rows])
    print("\n".join(lines))
    if arguments.record:
        command = f"python benchmarks/retrieval.py --passages {arguments.passages} --record"
        record(Path(__file__).with_name("RESULTS.md"), command, [*lines, ""], "retrieval.py", machine)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    if arguments.quick:
        print(QUICK)


# -- material --------------------------------------------------------------------------------------


def word(rng: random.Random) -> str:
    """A word by Zipf's law."""
    return f"w{int(VOCABULARY ** rng.random()):x}"


def write_corpus(path: Path, passages: int) -> None:
    rng = random.Random(0)
    with path.open("wb") as file:
        for number in range(passages):
            text = " ".join(word(rng) for _ in range(rng.randint(*WORDS)))
            file.write(orjson.dumps({"id": str(number), "contents": f'"Title {number}"\n{text}'}) + b"\n")


def queries_of(count: int, seed: int) -> list[str]:
    """Queries, all different. Their words are rarer than those of passages, as in questions."""
    rng = random.Random(seed)
    found: set[str] = set()
    while len(found) < count:
        words = [f"w{int(VOCABULARY ** rng.uniform(0.4, 1)):x}" for _ in range(rng.randint(*QUERY_WORDS))]
        found.add(" ".join(words))
    return sorted(found)


# -- BM25 ------------------------------------------------------------------------------------------


def bm25(folder: Path, corpus: Path, arguments: argparse.Namespace) -> dict[str, float]:
    index = folder / "bm25"
    words = ["search", "index", str(corpus), "--out", str(index), "--formula", "okapi"]
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "agentloop", *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    expect("exit code of the build", process.returncode, 0)
    built_s = time.perf_counter() - begin

    result = {
        "build s": built_s,
        "passages/s": arguments.passages / built_s,
        "build peak MB": usage.ru_maxrss / 1024,
        "index MB": sum(file.stat().st_size for file in index.iterdir()) / 2**20,
        f"recall@{TOP}": recall(corpus, Bm25Index(index), queries_of(arguments.queries, 1)),
    }
    expect_between(f"recall@{TOP}", result[f"recall@{TOP}"], 1.0, 1.0)
    port = free_port()
    serving = ["search", "serve", str(index), "--port", str(port), "--cache-queries", "0"]
    command = [sys.executable, "-m", "agentloop", *serving]
    with server(command, port) as pid:
        result |= asyncio.run(load(port, arguments.requests, pid))
        result |= run_loops(lag(port, arguments.episodes))
    return result


def recall(corpus: Path, index: Bm25Index, queries: Sequence[str]) -> float:
    """The share of the best passages by rank_bm25's BM25Okapi that the index finds; ties count as equal."""
    wanted = {found for query in queries for found in words_of(query)}
    postings: dict[str, list[tuple[int, int]]] = {found: [] for found in wanted}
    frequency: Counter[str] = Counter()
    lengths = []
    with corpus.open("rb") as file:
        for number, line in enumerate(file):
            counts = Counter(words_of(orjson.loads(line)["contents"]))
            lengths.append(counts.total())
            frequency.update(counts.keys())
            for found in wanted & counts.keys():
                postings[found].append((number, counts[found]))

    total = len(lengths)
    length, mean = np.array(lengths), sum(lengths) / total
    k1, b = DEFAULTS["okapi"]
    idf = {found: math.log(total - n + 0.5) - math.log(n + 0.5) for found, n in frequency.items()}
    floor = OKAPI_FLOOR * statistics.fmean(idf.values())
    found_count = wanted_count = 0
    for query in queries:
        scores = np.zeros(total)
        for term in words_of(query):
            if not postings[term]:
                continue
            numbers, tf = np.array(postings[term]).T
            value = floor if idf[term] < 0 else idf[term]
            scores[numbers] += value * tf * (k1 + 1) / (tf + k1 * (1 - b + b * length[numbers] / mean))
        k = min(TOP, int((scores > 0).sum()))
        if not k:
            continue
        least = np.partition(scores, -k)[-k]
        hits = index.search([query], TOP)[0].numbers
        found_count += min(k, int((scores[hits] >= least * (1 - 1e-5)).sum()))
        wanted_count += k
    expect("queries that find anything", wanted_count > len(queries), True)
    return found_count / wanted_count


# -- vectors ---------------------------------------------------------------------------------------


class HashEncoder:
    """A text is a random unit vector of its own: the index is measured, not an encoder."""

    def __init__(self, size: int) -> None:
        self.size = size

    def encode(self, texts: Sequence[str], *, query: bool) -> Any:
        rows = [np.random.default_rng(zlib.crc32(text.encode())).normal(size=self.size) for text in texts]
        vectors = np.array(rows, np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def flat(folder: Path, corpus: Path, arguments: argparse.Namespace) -> dict[str, float]:
    from tools.search.index.arrays import write_header, write_rows
    from tools.search.index.dense import VectorsIndex

    file = folder / "vectors.npy"
    rng, begin = np.random.default_rng(0), time.perf_counter()
    with file.open("wb") as out:
        write_header(out, np.float32, (arguments.passages, arguments.size))
        for first in range(0, arguments.passages, 50_000):
            rows = rng.normal(size=(min(50_000, arguments.passages - first), arguments.size)).astype(np.float32)
            write_rows(out, rows / np.linalg.norm(rows, axis=1, keepdims=True))
    built_s = time.perf_counter() - begin

    vectors = np.load(file, mmap_mode="r")
    encoder = HashEncoder(arguments.size)
    queries = queries_of(5, 2)
    exact = encoder.encode(queries, query=True) @ vectors.T
    for hits, scores in zip(VectorsIndex(vectors, encoder).search(queries, TOP), exact, strict=True):
        best = float(np.partition(scores, -TOP)[-TOP])
        expect("passages that faiss finds", int((scores[hits.numbers] >= best - 1e-5).sum()), TOP)

    port = free_port()
    command = [sys.executable, __file__, "--serve-vectors", str(file), str(corpus), str(port)]
    with server(command, port) as pid:
        found = asyncio.run(load(port, max(64, arguments.requests // 8), pid))
    return {"build s": built_s, "index MB": file.stat().st_size / 2**20, **found}


def serve_vectors(vectors: str, corpus: str, port: str) -> None:
    """Serve given vectors with the server itself."""
    from tools.search.corpus import open_corpus
    from tools.search.index.dense import VectorsIndex
    from tools.search.index.folder import Opened
    from tools.search.server.serving import serve

    array = np.load(vectors, mmap_mode="r")
    opened = Opened(VectorsIndex(array, HashEncoder(array.shape[1])), open_corpus(Path(corpus)), "dense")
    serve(
        lambda: opened, host="127.0.0.1", port=int(port), token_file=None, topk=3, threads=1, largest_batch=64,
        cache_queries=0, cache_bytes=2**28, say=lambda _: None,
    )  # fmt: skip


# -- clients ---------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def server(command: list[str], port: int) -> Iterator[int]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(1200):
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
                expect("the server runs", process.poll(), None)
        yield process.pid
    finally:
        process.kill()
        process.wait()


async def load(port: int, requests: int, pid: int) -> dict[str, float]:
    """`CLIENTS` clients, each with one request at a time, one query in each."""
    pool, url = ConnectionPool(CLIENTS), f"http://127.0.0.1:{port}/retrieve"
    waiting = queries_of(requests, 3)
    times: list[float] = []

    async def client() -> None:
        while waiting:
            body = orjson.dumps({"queries": [waiting.pop()], "topk": 3, "return_scores": True})
            begin = time.perf_counter()
            answer = await pool.handle_async_request(
                httpx.Request("POST", url, content=body, headers={"content-type": "application/json"})
            )
            times.append(time.perf_counter() - begin)
            expect("status", answer.status_code, 200)

    begin = time.perf_counter()
    await asyncio.gather(*[client() for _ in range(CLIENTS)])
    took = time.perf_counter() - begin
    await pool.aclose()
    expect("answers", len(times), requests)
    status = Path(f"/proc/{pid}/status").read_text()
    anonymous = int(status.split("RssAnon:")[1].split()[0]) / 1024
    times.sort()
    return {
        "queries/s": requests / took,
        "p50 ms": 1000 * times[len(times) // 2],
        "p99 ms": 1000 * times[int(0.99 * len(times))],
        "server MB (without mapped files)": anonymous,
    }


async def lag(port: int, episodes: int) -> dict[str, float]:
    """Episodes that search at the same moment, one query for all: the tool is measured, not the index."""
    config = {
        "retrieval_service_url": f"http://127.0.0.1:{port}/retrieve", "rate_limit": 100_000, "num_workers": 120,
    }  # fmt: skip
    tool = SearchTool(config, SearchTool.default_schema)
    toolset = Toolset([tool])
    queries = queries_of(16, 4)

    pacer = Pacer()
    passes = _Passes()

    async def episode(number: int) -> bool:
        await pacer.turn()  # as the runner of episodes does
        session = toolset.session(Task(str(number), "agent", []))
        result = await session.call(ToolCall("search", {"query_list": [queries[number % 16]]}), 30)
        return result.error is None

    with LoopLagMonitor() as monitor:
        await asyncio.sleep(0.2)
        begin = time.perf_counter()
        passes.begin()
        fine = await asyncio.gather(*[episode(number) for number in range(episodes)])
        took = time.perf_counter() - begin
        longest = passes.end()
        await asyncio.sleep(0.2)
        found = monitor.take()
    expect("searches", sum(fine), episodes)
    await tool._client.close()
    return {
        "episodes at once": episodes,
        "their searches/s": episodes / took,
        "loop lag max ms": 1000 * found["loop/lag_max_s"],
        "longest pass of the loop, CPU ms": 1000 * longest,
    }


class _Passes:
    """The CPU time of each pass of the event loop: its lag without what other programs take."""

    def __init__(self) -> None:
        self._longest = self._last = 0.0
        self._running = False

    def begin(self) -> None:
        self._running, self._last = True, time.thread_time()
        asyncio.get_running_loop().call_later(0, self._look)

    def end(self) -> float:
        """Return the seconds of the longest."""
        self._running = False
        return self._longest

    def _look(self) -> None:
        now = time.thread_time()
        self._longest, self._last = max(self._longest, now - self._last), now
        if self._running:
            asyncio.get_running_loop().call_later(0, self._look)


if __name__ == "__main__":
    main()
