"""Tokens a second through HTTP of the rollout server's torch engine, beside transformers, vLLM and SGLang on the CPU.

    python benchmarks/rollout.py [--scenario fixed-64 longtail] [--peers transformers vllm] [--rounds 5] [--record]

Each server runs on one core with one thread, the load comes from another core. All serve the same model in float32 and
answer with token ids and logprobs. Peers have environments of their own, made here on first use; one that cannot be
installed or started is reported, and the rest goes on. The servers are measured in turn, round after round.

fixed-1, fixed-64, fixed-256   so many requests at once: 50 prompt tokens, 64 new ones each
longtail                       64 at once, lengths lognormal: median 32, longest 512, the same for everybody
latency                        time to the first token and between tokens, streaming, 1 and 64 at once
multiturn                      8 groups of 8 samples that share a prompt, 8 turns each: prompt tokens reused
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import random
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quick import QUICK, add_quick_option, expect
from quiet import core_busy_s
from report import hardware, record, table
from rollout_load import Connections, Work, check, quantile
from rollout_servers import PEERS, NotRunning, Ours, Server

REPO = Path(__file__).resolve().parents[1]
QUICKSTART = REPO / "recipes" / "quickstart" / "model"

PROMPT, NEW = 50, 64
LONGTAIL_ROWS, LONGTAIL_MEDIAN, LONGTAIL_MAX = 64, 32, 512
GROUPS, SAMPLES, TURNS = 8, 8, 8
FIRST_PROMPT, TURN_NEW, TURN_OBSERVED = 128, 32, 24
"""multiturn: tokens of a group's prompt, sampled in each turn, and appended before the next one."""

SCENARIOS = ("fixed-1", "fixed-64", "fixed-256", "longtail", "latency", "multiturn")
BEST_BOUND, LONGTAIL_BOUND, REUSE_BOUND = 1.2, 4.0, 0.95

MEASURED_S = 0.8
"""A server's turn in a round: so many seconds of waves, one wave at least."""

BUSY = 0.15
"""Others' share of the server's core above which a wave does not count, as long as `ENOUGH` quiet ones remain."""

ENOUGH = 3


def make_model(source: Path, folder: Path) -> Path:
    """The quickstart's model with half as many heads, twice as wide: vLLM has no attention for heads of 16 on the CPU.
    The weights are the same tensors, so it samples something else, in the same time."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    if config["hidden_size"] // config["num_attention_heads"] == 16:
        config["num_attention_heads"] //= 2
        config["num_key_value_heads"] //= 2
        (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def longtail_lengths() -> list[int]:
    """Quantiles of the lognormal, shuffled: median, maximum and sum do not depend on a seed's luck."""
    normal = statistics.NormalDist()
    rows = LONGTAIL_ROWS
    sigma = math.log(LONGTAIL_MAX / LONGTAIL_MEDIAN) / normal.inv_cdf((rows - 0.5) / rows)
    drawn = [LONGTAIL_MEDIAN * math.exp(sigma * normal.inv_cdf((i + 0.5) / rows)) for i in range(rows)]
    random.Random(0).shuffle(drawn)
    return [min(LONGTAIL_MAX, max(1, round(length))) for length in drawn]


def _shape(lengths: Sequence[int]) -> tuple[int, int, int]:
    return len(lengths), round(statistics.median(lengths)), max(lengths)


class Bench:
    """The measurements of one server. Each returns what one wave gave."""

    def __init__(self, server: Server, vocabulary: int, seed: int) -> None:
        self.server = server
        self._vocabulary = vocabulary
        self._random = random.Random(seed)

    def _ids(self, count: int) -> list[int]:
        return [self._random.randrange(self._vocabulary) for _ in range(count)]

    def _work(self, scenario: str) -> list[Work]:
        lengths = longtail_lengths() if scenario == "longtail" else [NEW] * int(scenario.removeprefix("fixed-"))
        return [Work(self._ids(PROMPT), length) for length in lengths]

    async def throughput(self, connections: Connections, scenario: str) -> dict[str, float]:
        """One wave: tokens that were asked for, by the seconds from the first request to the last answer."""
        work = self._work(scenario)
        if scenario == "longtail":
            lengths = [one.new_tokens for one in work]
            expect(
                "rows, median and longest of longtail", _shape(lengths), (LONGTAIL_ROWS, LONGTAIL_MEDIAN, LONGTAIL_MAX)
            )
        answers, seconds = await self.server.timed(connections, work)
        check(work, self.server.outcomes(answers), self.server.name)
        tokens = sum(one.new_tokens for one in work)
        return {"tokens": tokens, "tokens_per_s": tokens / seconds}

    async def latency(self, connections: Connections, scenario: str) -> dict[str, float]:
        """Milliseconds to the first token and between events that bring tokens, at 1 and at 64 requests at once."""
        found: dict[str, float] = {}
        for at_once in (1, 64):
            answers, _ = await self.server.timed(connections, self._work(f"fixed-{at_once}"), stream=True)
            times = [self.server.token_times(answer) for answer in answers]
            if any(sum(count for _, count in one) != NEW for one in times):
                raise SystemExit(f"{self.server.name}: a stream brought another number of tokens than {NEW}")
            firsts = [one[0][0] for one in times]
            gaps = [b[0] - a[0] for one in times for a, b in itertools.pairwise(one)]
            for name, values in (("ttft", firsts), ("itl", gaps)):
                for share in (50, 99):
                    found[f"{name}_p{share}_{at_once}"] = 1e3 * quantile(values, share / 100)
        return found

    async def multiturn(self, connections: Connections, scenario: str) -> dict[str, float]:
        """Sessions whose prompts grow. What could be reused: all that a session was sent and sampled before, and the
        group's prompt for all samples but the first."""
        prompts = [ids for ids in (self._ids(FIRST_PROMPT) for _ in range(GROUPS)) for _ in range(SAMPLES)]
        number = self._random.randrange(2**32)
        cached = reusable = sampled = 0
        seconds = 0.0
        for turn in range(TURNS):
            work = [Work(prompt, TURN_NEW, f"{number}-{i}") for i, prompt in enumerate(prompts)]
            if turn == 0:
                reusable += FIRST_PROMPT * GROUPS * (SAMPLES - 1)
            else:
                reusable += sum(len(prompt) - TURN_OBSERVED for prompt in prompts)
            answers, took = await self.server.timed(connections, work)
            outcomes = self.server.outcomes(answers)
            check(work, outcomes, self.server.name)
            seconds += took
            sampled += TURN_NEW * len(work)
            cached += sum(outcome.cached_tokens for outcome in outcomes)
            prompts = [p + o.ids + self._ids(TURN_OBSERVED) for p, o in zip(prompts, outcomes, strict=True)]
        lengths = {len(prompt) for prompt in prompts}
        expect("tokens of a session", lengths, {FIRST_PROMPT + TURNS * (TURN_NEW + TURN_OBSERVED)})
        found = {"tokens": sampled, "tokens_per_s": sampled / seconds}
        if self.server.reports_cache:
            found["reused"] = cached / reusable
        return found

    def measure(self, scenario: str, seconds: float) -> list[dict[str, float]]:
        """Waves for so many seconds, one at least; `others`: what other processes took of the server's core."""
        call = getattr(self, scenario, self.throughput)
        waves = []
        self.server.go_on()
        try:
            connections = Connections(self.server.port)
            end = time.perf_counter() + seconds
            while not waves or time.perf_counter() < end:
                waves.append(asyncio.run(self._one(call, connections, scenario)))
        finally:
            self.server.hold()
        return waves

    async def _one(self, call: Callable[..., Any], connections: Connections, scenario: str) -> dict[str, float]:
        own, busy, begin = self.server.cpu_seconds(), core_busy_s(self.server.core), time.perf_counter()
        found: dict[str, float] = await call(connections, scenario)
        seconds, cpu = time.perf_counter() - begin, self.server.cpu_seconds() - own
        taken = core_busy_s(self.server.core) - busy - cpu
        await connections.close()
        return {**found, "cpu_s": cpu, "others": max(0.0, taken) / seconds}


def quiet(waves: Sequence[dict[str, float]]) -> tuple[list[dict[str, float]], bool]:
    """The waves that count, and whether others left the server its core in them."""
    calm = [wave for wave in waves if wave["others"] <= BUSY]
    return (calm, True) if len(calm) >= ENOUGH else (list(waves), False)


def median(waves: Sequence[dict[str, float]], key: str) -> float | None:
    values = [wave[key] for wave in quiet(waves)[0] if key in wave]
    return statistics.median(values) if values else None


def per_cpu_s(waves: Sequence[dict[str, float]]) -> float:
    """Tokens for each second that the server's processes really ran, over all waves, quiet or not."""
    return sum(wave["tokens"] for wave in waves) / max(1e-9, sum(wave["cpu_s"] for wave in waves))


Waves = dict[str, list[list[dict[str, float]]]]
"""By server: by round: its waves."""


def flat(rounds: Sequence[list[dict[str, float]]]) -> list[dict[str, float]]:
    return [wave for one in rounds for wave in one]


def verdict(scenario: str, results: Waves) -> tuple[str, bool]:
    """A line, and whether a bound was missed."""
    ours = results.get(Ours.name)
    if ours is None:
        return "", False
    if scenario == "multiturn":
        reused = median(flat(ours), "reused") or 0.0
        missed = reused < REUSE_BOUND
        return f"**Reused: {reused:.1%}** of what could be (to reach: {REUSE_BOUND:.0%}; {_word(missed)}).", missed
    own = median(flat(ours), "tokens_per_s")
    speeds = {
        name: median(flat(rounds), "tokens_per_s") or 0.0 for name, rounds in results.items() if name != Ours.name
    }
    bound = {"fixed-64": BEST_BOUND, "fixed-256": BEST_BOUND, "longtail": LONGTAIL_BOUND}.get(scenario)
    if scenario == "longtail":
        speeds = {name: speed for name, speed in speeds.items() if name == "transformers"}
    if not speeds or own is None:
        return "" if bound is None else "Not checked: there is no peer to compare with.", False
    best = max(speeds, key=lambda name: speeds[name])
    ratio = own / speeds[best]
    pairs = zip(ours, results[best], strict=True)
    by_round = ", ".join(f"{_speed(a) / _speed(b):.2f}" for a, b in pairs)
    text = f"**Ours / {best}: {ratio:.2f}**"
    if bound is None:
        return f"{text} (by round {by_round}).", False
    missed = ratio < bound
    busy = [name for name in (Ours.name, best) if not quiet(flat(results[name]))[1]]
    note = f"; others took the core from {', '.join(busy)}" if busy else ""
    return f"{text} (to reach: {bound}; {_word(missed)}{note}; by round {by_round}).", missed


def _word(missed: bool) -> str:
    return "MISSED" if missed else "met"


def _speed(waves: Sequence[dict[str, float]]) -> float:
    return statistics.median(wave["tokens_per_s"] for wave in waves)


def describe(scenario: str, results: Waves) -> tuple[str, bool]:
    """The section of one scenario, and whether a bound was missed."""
    if scenario == "latency":
        columns = [
            (f"{n} p{s}, {c} at once", f"{n}_p{s}_{c}") for c in (1, 64) for n in ("ttft", "itl") for s in (50, 99)
        ]
        columns = [(title.replace("ttft", "first token").replace("itl", "gap"), key) for title, key in columns]
        rows = [["milliseconds", *(title for title, _ in columns)]]
        for name, rounds in results.items():
            values = [median(flat(rounds), key) for _, key in columns]
            rows.append([name, *("" if value is None else f"{value:.1f}" for value in values)])
        return "\n".join([f"### {scenario}", "", *table(rows), ""]), False
    rows = [
        [
            "",
            "tokens/s",
            "slowest",
            "fastest",
            "per CPU s",
            "waves",
            "quiet",
            *(["reused"] if scenario == "multiturn" else []),
        ]
    ]
    for name, rounds in results.items():
        waves = flat(rounds)
        speeds = [wave["tokens_per_s"] for wave in quiet(waves)[0]]
        calm = sum(wave["others"] <= BUSY for wave in waves)
        values = (statistics.median(speeds), min(speeds), max(speeds), per_cpu_s(waves), len(waves), calm)
        row = [name, *(f"{value:,.0f}" for value in values)]
        if scenario == "multiturn":
            reused = median(waves, "reused")
            row.append("" if reused is None else f"{reused:.1%}")
        rows.append(row)
    line, missed = verdict(scenario, results)
    return "\n".join([f"### {scenario}", "", *table(rows), "", line, ""]), missed


def start(options: argparse.Namespace, model: Path, core: int, scratch: Path) -> tuple[list[Server], list[str]]:
    """The servers that could be started, held, and what is to be said of the others."""
    pythons = dict(one.split("=", 1) for one in options.python)
    kinds: list[type[Server]] = [PEERS[name] for name in options.peers]
    servers: list[Server] = []
    notes = []
    for kind in [*kinds, Ours]:
        python = pythons.get(kind.name)
        server = kind(model, core, scratch, Path(python) if python else None)
        print(f"starting {kind.name} ...", flush=True)
        try:
            server.start()
        except NotRunning as exc:
            if kind is Ours:
                raise SystemExit(str(exc)) from exc
            print(exc, flush=True)
            notes.append(f"Not measured: {kind.name} ({str(exc).splitlines()[-1].strip()})")
            continue
        server.hold()
        servers.append(server)
    return servers, notes


def measure(scenario: str, servers: Sequence[Server], options: argparse.Namespace, vocabulary: int) -> Waves:
    """All rounds of one scenario. The waves of the first, shorter one warm up and do not count."""
    results: Waves = {}
    benches = [Bench(server, vocabulary, seed=number) for number, server in enumerate(servers)]
    if scenario == "latency":
        benches = [bench for bench in benches if bench.server.streams]
    for number in range(1 if options.quick else 0, options.rounds + 1):
        for bench in benches:
            waves = bench.measure(scenario, options.seconds if number else 0.0)
            if number:
                results.setdefault(bench.server.name, []).append(waves)
    return results


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=5, help="how often the servers are measured in turn")
    parser.add_argument("--seconds", type=float, default=MEASURED_S, help="of waves in a server's turn")
    parser.add_argument("--cores", default="", help="SERVER,LOAD: for instance 0,1; default: the first two")
    parser.add_argument("--model", type=Path, help="another model's folder; its first 370 ids are used")
    parser.add_argument(
        "--python", nargs="+", default=[], metavar="PEER=INTERPRETER", help="an environment that is there already"
    )
    parser.add_argument("--json", type=Path, help="write every wave there")
    parser.add_argument("--record", action="store_true", help="write the tables into benchmarks/RESULTS.md")
    add_quick_option(parser)
    options = parser.parse_args()
    if options.quick:
        options.peers, options.rounds, options.seconds = [], 1, 0.0
        options.scenario = ["fixed-1", "longtail", "latency", "multiturn"]
    return options


def main() -> None:
    options = _options()
    available = sorted(os.sched_getaffinity(0))
    cores = [int(core) for core in options.cores.split(",")] if options.cores else [available[0], available[-1]]
    command = shlex.join(["python", "benchmarks/rollout.py", *sys.argv[1:]])
    machine = hardware()
    print(f"{command}\n{machine}; servers on core {cores[0]}, load on core {cores[-1]}\n", flush=True)
    results: dict[str, Waves] = {}
    tables, missed = [], []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = options.model.resolve() if options.model else make_model(QUICKSTART, scratch / "model")
        vocabulary = min(370, json.loads((model / "config.json").read_text())["vocab_size"])
        servers: list[Server] = []
        try:
            servers, notes = start(options, model, cores[0], scratch)
            os.sched_setaffinity(0, {cores[-1]})
            for scenario in options.scenario:
                results[scenario] = measure(scenario, servers, options, vocabulary)
                text, miss = describe(scenario, results[scenario])
                missed += [scenario] * miss
                tables.append(text)
                print(f"\n{text}", flush=True)
        finally:
            for server in servers:
                server.stop()
    tables += notes
    print("\n".join(notes))
    if options.json:
        document = {"command": command, "hardware": machine, "scenarios": results, "notes": notes}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.record:
        record(REPO / "benchmarks" / "RESULTS.md", command, tables, "rollout.py", machine)
    if options.quick:
        print(QUICK)
    if missed:
        print(f"missed: {', '.join(missed)}")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
