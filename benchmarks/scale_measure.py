"""What `scale_model.py --measure` measures: CPU of the product's own functions on generated trajectories, no GPU.

Each figure is CPU time, the least of several rounds, so that other programs disturb it little (they still take caches).
A cost that grows with the length is measured at two lengths; the straight line through them is what is printed.
"""

from __future__ import annotations

import asyncio
import importlib.util
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import workers

from agentloop.config import AlgorithmConfig
from agentloop.runtime.event_loop import run_loops
from agentloop.trace.signals.judge import SignalWatch
from agentloop.trace.store import TraceStore
from rollout_server.api.parsing import parse_generate
from rollout_server.api.stream import answer_fields
from rollout_server.engines.base import Generation
from rollout_server.replica.answer import Answer
from rollout_server.router.partial_answer import PartialAnswer
from trainer.algorithms.aggregation import normalizer
from trainer.channel import encode, samples_to_arrays
from trainer.packing.units import packed_length, split_over_ranks
from trainer.rollouts.producer import Group
from trainer.rollouts.samples import TrainGroup, collect, set_advantages
from trainer.run.episode_metrics import episode_metrics
from trainer.run.step import StepClock, TrainedStep

LENGTHS = (512, 8192)
"""Tokens of the trajectories: the two points of each line."""

GROUPS, GROUP, RANKS = 16, 8, 64
EVENT_TOKENS = 64
"""`rollout.stream_tokens` by default."""


def measure(*, rounds: int = 5, lengths: tuple[int, int] = LENGTHS) -> dict[str, float]:
    """Return the measured costs by name: `..._us` a unit, and `..._token_ns` for each token of it."""
    found: dict[str, float] = {}
    points = {name: [] for name in ("prepare", "send", "report", "trace", "signals")}
    for length in lengths:
        groups = make_groups(length)
        tokens = statistics.fmean(len(t) for group in groups for t in group.trajectories)
        for name, seconds in _driver(groups, rounds).items():
            points[name].append((tokens, seconds))
    for name, line in points.items():
        _add(found, name, *line)

    parse = [(n, _parse(n, rounds)) for n in (64, 16_384)]
    _add(found, "router_prompt", *parse)
    _add(found, "router_answer", *((n, _answer(n, rounds)) for n in (16, 2048)))
    found["router_event_us"] = 1e6 * asyncio.run(_event())
    return found


def measure_episodes(episodes: int = 500, rounds: int = 3) -> dict[str, float]:
    """Return CPU of the main process an episode that a worker runs, and CPU of a generation where it runs.

    Both by the parts of `workers.py`: 2 generations, one tool call, HTTP to a canned server.
    """
    found: dict[str, float] = {}
    points = []
    for tokens in (workers.TURN_TOKENS, 1024):
        with tempfile.TemporaryDirectory() as name, workers.canned(Path(name), turn_tokens=tokens) as url:
            points.append((float(tokens), run_loops(_generation_s(Path(name), url, tokens, episodes, rounds))))
            if tokens == workers.TURN_TOKENS:
                found["boundary_us"] = run_loops(workers.boundary(Path(name), url, rounds * episodes))["us_episode"]
    _add(found, "generation", *points)
    return found


async def _generation_s(folder: Path, url: str, tokens: int, episodes: int, rounds: int) -> float:
    """Return the CPU seconds that a generation of `tokens` tokens takes of the process that runs its episode."""
    seconds = []
    async with workers.runner(folder, url, workers=0, compute_s=0.0, at_once=64) as found:
        for number in range(rounds + 1):
            rows = workers.tasks(f"here{number}-", episodes)
            begin = time.thread_time()
            await workers.run(found, rows, 64, tokens)
            seconds.append((time.thread_time() - begin) / episodes / 2)
    return min(seconds[1:])


def make_groups(length: int) -> list[Group]:
    """Return groups of generated episodes of about `length` tokens in 8 turns, those of `trace.py`."""
    # By its path: the standard library has a module of that name.
    spec = importlib.util.spec_from_file_location("benchmark_trace", Path(__file__).with_name("trace.py"))
    assert spec is not None and spec.loader is not None
    material = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(material)
    records = material.trajectories(GROUPS, GROUP, length, random_ids=False)
    groups: dict[str, Group] = {}
    for record in records:
        trajectory = record.trajectory
        group = groups.setdefault(trajectory.group_id, Group(len(groups), None, []))  # type: ignore[arg-type]
        group.episodes.append([trajectory])
    return list(groups.values())


def _driver(groups: Sequence[Group], rounds: int) -> dict[str, float]:
    """Return seconds an episode of what the main process does with finished groups."""
    algorithm = AlgorithmConfig()
    count = sum(len(group.episodes) for group in groups)

    def prepare() -> list[TrainGroup]:
        batches = [collect(group) for group in groups]
        for batch in batches:
            packed_length(batch.samples)
            set_advantages(batch, algorithm)
        return batches

    samples = [sample for batch in prepare() for sample in batch.samples]
    trained = TrainedStep(1, 7, list(groups), StepClock(), {})
    rows = [0] * len(groups)

    def report() -> list[Any]:
        episode_metrics(list(groups), 6)
        return trained.records(rows)

    records = report()
    watch = SignalWatch()
    watch.add_row({"step": 1})
    with tempfile.TemporaryDirectory() as folder:
        store = TraceStore(Path(folder))
        return {
            "prepare": _cpu(prepare, rounds) / count,
            "send": _cpu(lambda: _send(samples), rounds) / count,
            "report": _cpu(report, rounds) / count,
            "trace": _cpu(lambda: store.write(1, "train", records), rounds, clock=time.process_time) / count,
            "signals": _cpu(lambda: watch.look(1, records), rounds) / count,
        }


def _send(samples: Sequence[Any]) -> None:
    """Send samples as `WorkerGroup.accumulate` does, to ranks that throw them away."""
    shares = split_over_ranks(samples, RANKS, 8192, 3584)
    normalizer(samples, "token_mean")
    chunks = [encode({}, samples_to_arrays([samples[i] for i in share])) for share in shares]
    ours, theirs = socket.socketpair()
    reader = threading.Thread(target=_drain, args=(theirs,))
    reader.start()
    with ours:
        for message in chunks:
            for chunk in message:
                ours.sendall(chunk)
    reader.join()


def _drain(sock: socket.socket) -> None:
    buffer = bytearray(1 << 20)
    with sock:
        while sock.recv_into(buffer):
            pass


def _request(prompt: int, new: int) -> bytes:
    ids = np.random.default_rng(0).integers(0, 151_643, prompt).tolist()
    return orjson.dumps(
        {"input_ids": ids, "sampling_params": {"max_new_tokens": new, "temperature": 1.0}, "return_logprob": True}
    )


def _parse(prompt: int, rounds: int) -> float:
    """Return seconds of what the router does with a prompt: parse, check, and write it again for the replica."""
    body = _request(prompt, 512)

    def work() -> None:
        for _ in range(20):
            request = parse_generate(body)
            assert not isinstance(request, list)
            ids = request.input_ids
            assert max(ids) < 151_643 and min(ids) >= 0
            orjson.dumps({"rid": "1", "input_ids": ids, "sampling_params": {}, "return_logprob": True})

    return _cpu(work, rounds) / 20


def _events(tokens: int, every: int) -> list[bytes]:
    """Return the events of an answer, as a replica streams them."""
    rng = np.random.default_rng(1)
    events = []
    for start in range(0, tokens, every):
        count = min(every, tokens - start)
        ids = rng.integers(0, 151_643, count).tolist()
        pairs = [[-float(x), token, None] for x, token in zip(rng.exponential(0.7, count), ids, strict=True)]
        last = start + count == tokens
        meta = {
            "id": "1", "prompt_tokens": 64, "completion_tokens": start + count, "weight_version": "6",
            "finish_reason": {"type": "stop", "matched": 1} if last else None, "cached_tokens": 0,
            "weight_versions": [{"version": "6", "start": 0, "end": start + count}], "output_token_logprobs": pairs,
        }  # fmt: skip
        events.append(orjson.dumps({"output_ids": ids, "meta_info": meta}))
    return events


def _generation(new: int) -> Generation:
    request = parse_generate(_request(64, new))
    assert not isinstance(request, list)
    return Generation("1", request.input_ids, request.sampling_params)


def _answer(tokens: int, rounds: int) -> float:
    """Return seconds of what the router does with a whole answer: read it, and write it again for the client."""
    (body,) = _events(tokens, tokens)
    generation = _generation(tokens)

    def work() -> None:
        for _ in range(20):
            answer = Answer(generation, str, None, incremental=True)
            answer.take(body)
            orjson.dumps(answer_fields(generation, answer.result(), return_logprob=True))

    return _cpu(work, rounds) / 20


async def _event(events: int = 3000) -> float:
    """Return seconds of one streamed event of 64 tokens, from the socket into the partial answer.

    An event arrives in a pass of the loop of its own: the most that it can cost.
    """
    stream = [b"data: " + event + b"\n\n" for event in _events(EVENT_TOKENS * 30, EVENT_TOKENS)[:-1]]
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    loop, done = asyncio.get_running_loop(), [0]

    class Reader(asyncio.Protocol):
        answer: Answer

        def data_received(self, data: bytes) -> None:
            self.answer.feed(data)
            done[0] += 1

    transport, reader = await loop.create_connection(Reader, sock=ours)
    sent, sending = 0, 0.0
    begin = time.thread_time()
    with theirs:
        while sent < events:
            partial = PartialAnswer(_generation(10_000), EVENT_TOKENS)
            reader.answer = Answer(partial.rest(), str, None, incremental=True)
            for event in stream:
                mark = time.thread_time()
                theirs.sendall(event)
                sending += time.thread_time() - mark
                sent += 1
                while done[0] < sent:  # noqa: ASYNC110  # the passes of the loop are what is measured
                    await asyncio.sleep(0)
        seconds = time.thread_time() - begin - sending
    transport.close()
    return seconds / sent


def _cpu(work: Callable[[], object], rounds: int, clock: Callable[[], float] = time.thread_time) -> float:
    """Return the least CPU seconds of `work`, after one run that does not count."""
    work()
    times = []
    for _ in range(rounds):
        begin = clock()
        work()
        times.append(clock() - begin)
    return min(times)


def _add(found: dict[str, float], name: str, short: tuple[float, float], long: tuple[float, float]) -> None:
    """Add the line through two points (tokens, seconds): microseconds at 0 tokens, nanoseconds a token."""
    slope = (long[1] - short[1]) / (long[0] - short[0])
    found[f"{name}_us"] = max(0.0, 1e6 * (short[1] - slope * short[0]))
    found[f"{name}_token_ns"] = 1e9 * slope
