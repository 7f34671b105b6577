"""What routing costs, and how evenly it loads replicas; the Rust `sglang-router` 0.3.2 beside ours.

    python benchmarks/router.py

`latency`: a small request through the router against the same request to the replica directly, one at a time.
`throughput`: 64 such requests in flight. The router has a core of its own; replica and clients share the other.
`sessions`: 64 sessions of 8 turns with skewed lengths over 4 replicas that take an engine's time, against a split made
with all lengths known (longest session first, to the replica with the least tokens).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
from quick import QUICK, add_quick_option, expect

from agentloop.client.connections import ConnectionPool

ROOT = Path(__file__).resolve().parents[1]
STUB = ROOT / "benchmarks/peers/stub_replica.py"
MODEL = ROOT / "recipes/quickstart/model"
PEER_VENV = ROOT / ".venv-sglang-router"
PEER = "sglang-router==0.3.2"
CORES = sorted(os.sched_getaffinity(0))
ROUTER_CORES = {CORES[0]}
OTHER_CORES = {CORES[-1]}

MAX_ADDED_MS, MIN_REQUESTS_S, MIN_OF_PERFECT = 1.0, 1500.0, 0.9
SMALL = {"input_ids": list(range(3, 53)), "sampling_params": {"max_new_tokens": 16}, "return_logprob": True}
SESSIONS, TURNS, REPLICAS, IN_FLIGHT = 64, 8, 4, 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement, in turn; medians are compared")
    parser.add_argument("--requests", type=int, default=3000, help="requests of a throughput round")
    parser.add_argument("--no-peer", action="store_true", help="do not install and run sglang-router")
    parser.add_argument("--json", type=Path, help="write the figures here")
    add_quick_option(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.requests, arguments.no_peer = 1, 200, True
    os.sched_setaffinity(0, OTHER_CORES)
    peer = None if arguments.no_peer else _peer_python()
    figures = {**_cost(arguments, peer), **_sessions(arguments, peer)}
    for name, value in figures.items():
        print(f"{name:44s} {value:10.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))
    misses = [
        text
        for missed, text in (
            (figures["latency_added_ms/ours"] > MAX_ADDED_MS, f"adds more than {MAX_ADDED_MS} ms"),
            (figures["requests_s/ours"] < MIN_REQUESTS_S, f"fewer than {MIN_REQUESTS_S:.0f} requests/s"),
            (figures["of_perfect_split/ours"] < MIN_OF_PERFECT, f"less than {MIN_OF_PERFECT:.0%} of a perfect split"),
        )
        if missed
    ]
    if arguments.quick:
        print(QUICK)
        return 0
    for miss in misses:
        print("MISSED:", miss)
    return 1 if misses else 0


def _cost(arguments: argparse.Namespace, peer: str | None) -> dict[str, float]:
    latency: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {}
    instant = [sys.executable, str(STUB), "{port}", "instant"]
    with _process(instant, OTHER_CORES) as stub, _routers([stub], peer) as urls:
        for _ in range(arguments.rounds):
            for name, url in {"direct": stub, **urls}.items():
                latency.setdefault(name, []).append(asyncio.run(_latency(url, min(400, arguments.requests))))
                rates.setdefault(name, []).append(asyncio.run(_rate(url, arguments.requests)))
    figures = {}
    for name in latency:
        figures[f"latency_p50_ms/{name}"] = 1e3 * statistics.median(latency[name])
        figures[f"requests_s/{name}"] = statistics.median(rates[name])
    for name in latency:
        if name != "direct":
            added = [a - b for a, b in zip(latency[name], latency["direct"], strict=True)]
            figures[f"latency_added_ms/{name}"] = 1e3 * statistics.median(added)
    return figures


def _sessions(arguments: argparse.Namespace, peer: str | None) -> dict[str, float]:
    seconds: dict[str, list[float]] = {}
    cached: dict[str, list[float]] = {}
    for number in range(max(1, arguments.rounds // 2)):
        work = skewed_sessions(seed=number)
        if arguments.quick:
            work = [turns[:3] for turns in work[: SESSIONS // 8]]
        stubs = [_process([sys.executable, str(STUB), "{port}", "timed"], OTHER_CORES) for _ in range(REPLICAS)]
        urls = [stub.__enter__() for stub in stubs]
        try:
            with _routers(urls, peer) as routers:
                split = perfect_split(work, urls)
                ways: dict[str, Callable[[int], str]] = {"perfect": split.__getitem__}
                ways |= {name: lambda _, url=url: url for name, url in routers.items()}  # type: ignore[misc]
                for salt, (name, where) in enumerate(ways.items()):
                    took, share = asyncio.run(_play(work, where, salt))
                    seconds.setdefault(name, []).append(took)
                    cached.setdefault(name, []).append(share)
        finally:
            for stub in stubs:
                stub.__exit__(None, None, None)
    figures = {f"sessions_s/{name}": statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        if name != "perfect":
            ratios = [best / value for best, value in zip(seconds["perfect"], values, strict=True)]
            figures[f"of_perfect_split/{name}"] = statistics.median(ratios)
        figures[f"cached_of_reusable/{name}"] = statistics.median(cached[name])
    return figures


@dataclass
class Turn:
    """New prompt tokens, and sampled ones."""

    prompt: int
    new: int


def skewed_sessions(seed: int) -> list[list[Turn]]:
    """Lengths as agents have them: lognormal, a few sessions long in every turn."""
    rnd = random.Random(seed)
    sessions = []
    for _ in range(SESSIONS):
        size = rnd.lognormvariate(0.0, 0.6)
        lengths = [min(512, max(4, round(size * rnd.lognormvariate(3.4, 0.8)))) for _ in range(TURNS)]
        sessions.append([Turn(rnd.randint(20, 120), new) for new in lengths])
    return sessions


def perfect_split(work: list[list[Turn]], urls: list[str]) -> dict[int, str]:
    """Each session's replica, when everything is known beforehand."""
    load = dict.fromkeys(urls, 0)
    split = {}
    for index in sorted(range(len(work)), key=lambda i: -sum(turn.new for turn in work[i])):
        split[index] = min(load, key=load.__getitem__)
        load[split[index]] += sum(turn.new for turn in work[index])
    return split


async def _play(work: list[list[Turn]], where: Callable[[int], str], salt: int) -> tuple[float, float]:
    """Seconds for all sessions, and the share of reusable prompt tokens that were reused."""
    reusable = reused = 0
    async with httpx.AsyncClient(transport=ConnectionPool(SESSIONS), timeout=300) as http:

        async def play(index: int) -> None:
            nonlocal reusable, reused
            rnd = random.Random(1000 * salt + index)
            ids = [rnd.randrange(3, 380) for _ in range(8)]
            known = 0
            for turn in work[index]:
                ids += [rnd.randrange(3, 380) for _ in range(turn.prompt)]
                body = {
                    "input_ids": ids, "return_logprob": True,
                    "sampling_params": {"max_new_tokens": turn.new, "ignore_eos": True},
                }  # fmt: skip
                headers = {"X-Session-Id": f"{salt}-{index}", "content-type": "application/json"}
                answer = await http.post(where(index) + "/generate", content=orjson.dumps(body), headers=headers)
                assert answer.status_code == 200, answer.text
                result = answer.json()
                reusable += known
                reused += min(known, result["meta_info"]["cached_tokens"])
                expect("tokens of an answer", len(result["output_ids"]), turn.new)
                ids += result["output_ids"]
                known = len(ids)

        begin = time.perf_counter()
        await asyncio.gather(*(play(index) for index in range(len(work))))
        return time.perf_counter() - begin, reused / reusable


async def _latency(url: str, requests: int) -> float:
    """Median seconds of one small request after the other."""
    body = orjson.dumps(SMALL)
    times = []
    async with httpx.AsyncClient(transport=ConnectionPool(1), timeout=60) as http:
        for number in range(requests + 50):
            begin = time.perf_counter()
            answer = await http.post(url + "/generate", content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 200, answer.text
            expect("tokens of an answer", len(orjson.loads(answer.content)["output_ids"]), 16)
            if number >= 50:
                times.append(time.perf_counter() - begin)
    return statistics.median(times)


async def _rate(url: str, requests: int) -> float:
    """Requests a second with so many in flight."""
    body = orjson.dumps(SMALL)
    left = requests
    async with httpx.AsyncClient(transport=ConnectionPool(IN_FLIGHT), timeout=60) as http:
        request = http.build_request(
            "POST", url + "/generate", content=body, headers={"content-type": "application/json"}
        )
        transport: Any = http._transport

        async def work() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                # The transport alone: a client's own cost would be most of what is measured.
                answer = await transport.handle_async_request(request)
                assert answer.status_code == 200

        begin = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))
        expect("requests left", left, 0)
        return requests / (time.perf_counter() - begin)


@contextmanager
def _routers(replicas: list[str], peer: str | None) -> Iterator[dict[str, str]]:
    """Ours and the peer's, over the same replicas."""
    ours = [sys.executable, "-P", "-m", "rollout_server", "--model", str(MODEL), "--port", "{port}"]
    for url in replicas:
        ours += ["--replica-url", url]
    with _process(ours, ROUTER_CORES) as url:
        if peer is None:
            yield {"ours": url}
            return
        command = [peer, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", "{port}"]
        command += ["--prometheus-port", str(_free_port()), "--log-level", "warn", "--worker-urls", *replicas]
        with _process(command, ROUTER_CORES) as peer_url:
            yield {"ours": url, "sglang-router": peer_url}


@contextmanager
def _process(command: list[str], cores: set[int]) -> Iterator[str]:
    """Run a server on `cores`; yields its URL when it answers."""
    port = _free_port()
    log = Path(tempfile.gettempdir()) / f"benchmark-router-{port}.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [part.replace("{port}", str(port)) for part in command],
            stdout=out, stderr=out, env=environment, preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(f"{command[:4]} ended: {log.read_text(errors='replace')[-2000:]}")
            try:
                probe = httpx.post(url + "/generate", json=SMALL, timeout=5, trust_env=False)
                if probe.status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        else:
            raise SystemExit(f"{command[:4]} did not answer: {log.read_text(errors='replace')[-2000:]}")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
        log.unlink(missing_ok=True)


def _peer_python() -> str:
    """The interpreter of the peer's environment, made on first use."""
    python = PEER_VENV / "bin/python"
    if not (PEER_VENV / "installed").exists():
        print(f"installing {PEER} into {PEER_VENV.name}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(PEER_VENV)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", PEER], check=True)
        (PEER_VENV / "installed").touch()
    return str(python)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
