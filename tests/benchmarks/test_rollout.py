"""`benchmarks/rollout.py` with our server alone at the smallest sizes, its clients, and its verdicts."""

from __future__ import annotations

import asyncio
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MODULES = ("rollout", "rollout_load", "rollout_servers", "quiet", "report")


@pytest.fixture
def bench(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The benchmark's main module; its folder is no package."""
    monkeypatch.syspath_prepend(str(repo / "benchmarks"))
    yield importlib.import_module("rollout")
    for name in MODULES:
        sys.modules.pop(name, None)


def waves(*speeds: float, others: float = 0.0) -> list[dict[str, float]]:
    return [{"tokens": 10.0, "tokens_per_s": speed, "cpu_s": 1.0, "others": others} for speed in speeds]


@pytest.mark.benchmark
def test_our_server_alone_is_measured_and_its_reuse_meets_the_bound(repo: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(repo / "benchmarks" / "rollout.py"), "--quick", "--json", str(tmp_path / "out.json")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    scenarios = json.loads((tmp_path / "out.json").read_text())["scenarios"]
    assert set(scenarios) == {"fixed-1", "longtail", "latency", "multiturn"}
    ((wave,),) = scenarios["multiturn"]["agentloop"]
    assert 0.95 < wave["reused"] <= 1.0
    ((latency,),) = scenarios["latency"]["agentloop"]
    assert {"ttft_p50_1", "ttft_p99_64", "itl_p50_64", "itl_p99_1"} <= set(latency)


def test_a_bound_is_judged_by_medians_against_the_best_peer(bench: Any) -> None:
    results = {"slow": [waves(50, 50, 50)], "fast": [waves(90, 100, 900)], "agentloop": [waves(130, 125, 1)]}
    text, missed = bench.verdict("fixed-64", results)
    assert "Ours / fast: 1.25" in text and "met" in text and not missed
    results["agentloop"] = [waves(119, 119, 119)]
    text, missed = bench.verdict("fixed-64", results)
    assert "1.19" in text and "MISSED" in text and missed


def test_the_long_tail_is_judged_against_transformers_alone(bench: Any) -> None:
    results = {"vllm": [waves(1000)], "transformers": [waves(100)], "agentloop": [waves(399)]}
    text, missed = bench.verdict("longtail", results)
    assert "Ours / transformers: 3.99" in text and missed
    del results["transformers"]
    text, missed = bench.verdict("longtail", results)
    assert "Not checked" in text and not missed


def test_waves_that_others_disturbed_do_not_count_while_enough_quiet_ones_remain(bench: Any) -> None:
    disturbed = waves(1, 1, 1, 1, others=0.5)
    assert bench.median([*disturbed, *waves(10, 11, 12)], "tokens_per_s") == 11
    assert bench.median([*disturbed, *waves(10, 11)], "tokens_per_s") == 1


def test_the_long_tail_has_its_median_and_its_longest(bench: Any) -> None:
    lengths = sorted(bench.longtail_lengths())
    assert len(lengths) == 64 and lengths[-1] == 512 and lengths[31] <= 32 <= lengths[32]


def test_events_of_a_stream_are_timed_by_their_last_part(bench: Any) -> None:
    load = sys.modules["rollout_load"]
    answer = load.Answer(parts=[(0.1, b'data: {"a"'), (0.2, b": 1}\n\ndata: 2\n\n"), (0.3, b"data: [DONE]\n\n")])
    assert load.events(answer) == [(0.2, b'{"a": 1}'), (0.2, b"2")]


def test_connections_read_whole_and_chunked_answers_and_refuse_errors(bench: Any) -> None:
    load = sys.modules["rollout_load"]
    replies = [
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nxy\r\n1\r\nz\r\n0\r\n\r\n",
        b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\nno",
    ]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for reply in replies:
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"content-length: 2" in head and await reader.readexactly(2) == b"{}"
            writer.write(reply)
        await reader.read()
        writer.close()

    async def talk() -> tuple[bytes, bytes, list[bytes]]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        connections = load.Connections(server.sockets[0].getsockname()[1])
        whole = await connections.post("/", b"{}")
        chunked = await connections.post("/", b"{}")
        with pytest.raises(RuntimeError, match="400"):
            await connections.post("/", b"{}")
        await connections.close()
        server.close()
        return whole.body, chunked.body, [data for _, data in chunked.parts]

    assert asyncio.run(talk()) == (b"abc", b"xyz", [b"xy", b"z"])


def test_an_answer_of_another_length_ends_the_run(bench: Any) -> None:
    load = sys.modules["rollout_load"]
    work = [load.Work([1, 2], 2)]
    load.check(work, [load.Outcome([1, 2], [-0.1, -0.2])], "x")
    for wrong in (load.Outcome([1], [-0.1]), load.Outcome([1, 2], [-0.1]), load.Outcome([1, 2], [-0.1, float("nan")])):
        with pytest.raises(SystemExit):
            load.check(work, [wrong], "x")
