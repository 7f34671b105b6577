"""Run one measurement of `loop_overhead.py` and print one JSON object.

python benchmarks/loop_worker.py episodes --generations 2 --at-once 512 --rounds 4 --observed distinct
python benchmarks/loop_worker.py history --turns 128 --tokens 64000
python benchmarks/loop_worker.py profile --generations 8 --at-once 512 --observed distinct
"""

from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import asyncio
import ctypes
import gc
import itertools
import json
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from material import SHARED, add_tokenizer_option, existing, load_qwen
from quick import expect

from agentloop.agent.runner import EpisodeRunner
from agentloop.agent.tool_agent import ToolAgent
from agentloop.chat import ChatRenderer
from agentloop.client.client import GenerateResult
from agentloop.columns import TokenIds
from agentloop.config import AgentConfig, SamplingConfig
from agentloop.runtime.event_loop import run_loops
from agentloop.runtime.lag import LoopLagMonitor
from agentloop.tool.base import Tool
from agentloop.tool.session import Toolset
from agentloop.types import EpisodeStatus, Message, StopReason, Task, ToolResult, Trajectory
from agentloop.wire import SamplingParams

GROUP = 8
TOKENS = 64
"""Sampled tokens of a generation."""

WARM_UP = 16
BANDS = 8
"""Number of history lengths in the table; the episode needs more turns than this."""

SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluates an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "for instance 12 * (3 + 4)"}},
            "required": ["expression"],
        },
    },
}
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "12 * (3 + 4)"}}\n</tool_call><|im_end|>'


class CannedClient:
    """Answer at once with canned ids: a tool call in every generation of an episode but the last.

    `sleep(0)` lets every other episode continue before this answer is read, so that all are in
    flight.
    """

    def __init__(self, call: list[int], answer: list[int], generations: int) -> None:
        self._call, self._answer, self._generations = call, answer, generations
        self._spoken: dict[str, int] = {}
        self.most_in_flight = 0
        self.seen: list[tuple[float, int]] | None = None

    async def generate(
        self, input_ids: Sequence[int], sampling: SamplingParams, *, session_id: str, rid: str
    ) -> GenerateResult:
        if self.seen is not None:
            self.seen.append((time.process_time(), len(input_ids)))
        number = self._spoken.get(session_id, 0) + 1
        self._spoken[session_id] = number
        self.most_in_flight = max(self.most_in_flight, len(self._spoken))
        await asyncio.sleep(0)
        if number == self._generations:
            del self._spoken[session_id]
        ids = self._answer if number == self._generations else self._call
        return GenerateResult(list(ids), [-0.5] * len(ids), [3] * len(ids), StopReason.STOP)


class Calculator(Tool):
    """Return at once: the same text at every call, or a different one each time."""

    def __init__(self, distinct: bool) -> None:
        super().__init__({}, SCHEMA)
        self._distinct = distinct
        self._calls = 0

    async def execute(self, state: Any, arguments: dict[str, Any], **execute_kwargs: Any) -> ToolResult:
        self._calls += self._distinct
        return ToolResult(f"The value of the expression is {self._calls * 7919 % 1_000_003}, computed exactly.")


class TimedRenderer(ChatRenderer):
    """Sum the CPU time of rendering and tokenizing."""

    seconds = 0.0

    def start(self, *args: Any) -> list[int]:
        return self._timed(super().start, *args)

    def extend(self, *args: Any) -> list[int]:
        return self._timed(super().extend, *args)

    def parse(self, *args: Any) -> Any:
        return self._timed(super().parse, *args)

    def encode_text(self, *args: Any) -> list[int]:
        return self._timed(super().encode_text, *args)

    def _timed(self, method: Any, *args: Any) -> Any:
        begin = time.process_time()
        result = method(*args)
        self.seconds += time.process_time() - begin
        return result


async def score(task: Task, text: str, trajectory: Trajectory) -> float:
    """Return a constant reward, at no cost."""
    return 1.0


class Bench:
    """The real runner, renderer and tool session around the canned client."""

    def __init__(self, options: argparse.Namespace, generations: int, tokens: int, kind: type[ChatRenderer]) -> None:
        tokenizer = load_qwen(options.tokenizer)
        template = existing(options.template, "--template").read_text(encoding="utf-8")
        self.renderer = kind(tokenizer, chat_template=template)
        self.client = CannedClient(self._canned(CALL, tokens), self._canned("It is 84.<|im_end|>", tokens), generations)
        self.tool = Calculator(options.observed == "distinct")
        limits = AgentConfig(max_assistant_turns=generations, max_response_tokens=10**6, max_tool_response_tokens=512)
        self.runner = EpisodeRunner(
            renderer=self.renderer,
            generator=self.client,
            agents={"tool_agent": ToolAgent},
            limits={"tool_agent": limits},
            toolset=Toolset([self.tool]),
            reward=score,
            context_length=10**6,
        )
        self.sampling = SamplingConfig(max_new_tokens=tokens)
        self.generations = generations
        self._distinct = options.observed == "distinct"
        self._groups = 0

    def _canned(self, text: str, tokens: int) -> list[int]:
        """Return `tokens` ids that end in `text`."""
        encode = self.renderer.tokenizer.backend_tokenizer.encode
        end = encode(text, add_special_tokens=False).ids
        thought = encode("First I think about which numbers there are and what to do with them. " * tokens).ids
        return [*thought[: tokens - len(end)], *end]

    def tasks(self, episodes: int) -> list[Task]:
        """Return the rows of a number of episodes; a group of 8 shares one."""
        rows = []
        for _ in range(-(-episodes // GROUP)):
            self._groups += 1
            about = f"Question {self._groups * self._distinct}: what is 12 * (3 + 4)?"
            prompt: list[Message] = [
                {"role": "system", "content": "You solve problems. Use the calculator for every computation."},
                {"role": "user", "content": about},
            ]
            rows.append(Task(str(self._groups), "tool_agent", prompt, ground_truth="84"))
        return [rows[i // GROUP] for i in range(episodes)]

    async def run(self, tasks: list[Task]) -> list[Trajectory]:
        """Run all episodes at once; exit if one does not end as planned."""
        jobs = [
            asyncio.create_task(
                self.runner.run(
                    task, group_id=f"g{task.task_id}", sample_index=i % GROUP, sampling=self.sampling, seed=1
                )
            )
            for i, task in enumerate(tasks)
        ]
        trajectories = [trajectory for found in await asyncio.gather(*jobs) for trajectory in found]
        for trajectory in trajectories:
            if trajectory.status is not EpisodeStatus.OK or len(trajectory.turns) != self.generations:
                raise SystemExit(
                    f"an episode ended {trajectory.status} in turn {len(trajectory.turns)}: {trajectory.error}"
                )
        return trajectories


def fill_free_blocks() -> list[bytes]:
    """Use up the free memory inside this process, so that every later allocation makes it grow.

    Returns:
        Objects that fill the free blocks of Python's allocator (up to 512 bytes); keep them. Larger
        blocks are freed.
    """
    gc.collect()
    ballast = [bytes(size - b"".__sizeof__()) for size in range(48, 513, 16) for _ in range(2000)]
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return ballast


def memory(peak: bool) -> int:
    """Return the resident bytes of this process: now, or the peak since `reset_peak`."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    name = "VmHWM:" if peak else "VmRSS:"
    [line] = [line for line in status.read_text(encoding="ascii").splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5", encoding="ascii")


def own_bytes(trajectories: list[Trajectory]) -> int:
    """Return the bytes of the four columns, spare capacity included, each rounded up as the
    allocator does."""
    return sum(
        -(-sys.getsizeof(column) // 16) * 16
        for trajectory in trajectories
        for column in (trajectory.token_ids, trajectory.loss_mask, trajectory.logprobs, trajectory.versions)
    )


def measure_episodes(options: argparse.Namespace) -> dict[str, Any]:
    """Measure CPU, rate and memory of `rounds` rounds of `at_once` episodes, all of a round in
    flight together."""
    bench = Bench(options, options.generations, TOKENS, ChatRenderer)
    set_up = time.process_time()
    run_loops(bench.run(bench.tasks(WARM_UP)))
    batches = [bench.tasks(options.at_once) for _ in range(options.rounds)]
    bench.client.most_in_flight = 0
    ballast = fill_free_blocks()
    gc.collect()
    reset_peak()
    before = memory(peak=False)

    lag = LoopLagMonitor()

    async def rounds() -> tuple[float, float, int, list[Trajectory]]:
        wall, cpu, peak = time.perf_counter(), time.process_time(), 0
        first: list[Trajectory] = []
        with lag:
            for number, tasks in enumerate(batches):
                done = await bench.run(tasks)
                if number == 0:
                    peak, first = memory(peak=True), done
        return time.perf_counter() - wall, time.process_time() - cpu, peak, first

    wall, cpu, peak, first = run_loops(rounds())
    expect("episodes in flight", bench.client.most_in_flight, options.at_once)
    expect("sampled tokens of an episode", {t.sampled_tokens for t in first}, {options.generations * TOKENS})
    episodes = options.at_once * options.rounds
    tokens = own_bytes(first) / options.at_once
    assert ballast  # keep it alive until here
    return {
        "generations": options.generations,
        "at_once": options.at_once,
        "observed": options.observed,
        "episodes": episodes,
        "cpu_ms_episode": 1e3 * cpu / episodes,
        "cpu_us_generation": 1e6 * cpu / episodes / options.generations,
        "episodes_per_s": episodes / wall,
        "kb_episode": (peak - before) / options.at_once / 1e3,
        "kb_tokens": tokens / 1e3,
        "kb_beyond_tokens": ((peak - before) / options.at_once - tokens) / 1e3,
        "peak_mb": peak / 1e6,
        "tokens_episode": sum(map(len, first)) / len(first),
        "bytes_token": tokens * options.at_once / sum(map(len, first)),
        "set_up_cpu_s": set_up,
        "lag_max_s": lag.take()["loop/lag_max_s"],
    }


def measure_history(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the CPU of each turn of one long episode, from request to request, and of its
    rendering."""
    import numpy as np
    import orjson

    observed = 29  # tokens a turn, template included; the rest is sampled
    bench = Bench(options, options.turns, -(-options.tokens // options.turns) - observed, TimedRenderer)
    assert isinstance(bench.renderer, TimedRenderer)
    run_loops(bench.run(bench.tasks(1)))
    runs: list[list[tuple[float, int]]] = []
    totals, rendering = [], []
    done: list[Trajectory] = []

    async def rounds() -> None:  # returns None: asyncio forms the repr of a result, which is long here
        for _ in range(options.rounds):
            bench.client.seen, bench.renderer.seconds = [], 0.0
            tasks = bench.tasks(1)
            gc.collect()
            begin = time.process_time()
            done[:] = await bench.run(tasks)
            totals.append(time.process_time() - begin)
            rendering.append(bench.renderer.seconds)
            runs.append(bench.client.seen)

    run_loops(rounds())
    [trajectory] = done
    lengths = [length for _, length in runs[0]]
    costs = [statistics.median(run[turn + 1][0] - run[turn][0] for run in runs) for turn in range(len(lengths) - 1)]
    edges = [round(part * len(costs) / BANDS) for part in range(BANDS + 1)]
    bands = []
    for begin, end in itertools.pairwise(edges):
        ids = TokenIds(trajectory.token_ids[: lengths[end]])
        clock = time.process_time()
        for _ in range(20):
            orjson.dumps({"input_ids": ids}, default=np.asarray, option=orjson.OPT_SERIALIZE_NUMPY)  # as the client
        bands.append(
            {
                "to_tokens": len(ids),
                "us_turn": 1e6 * statistics.median(costs[begin:end]),
                "us_json": 1e6 * (time.process_time() - clock) / 20,
            }
        )
    generation_s = trajectory.sampled_tokens / options.rate
    return {
        "turns": len(trajectory.turns),
        "tokens": len(trajectory),
        "sampled": trajectory.sampled_tokens,
        "bands": bands,
        "last_over_first": bands[-1]["us_turn"] / bands[0]["us_turn"],
        "cpu_s": statistics.median(totals),
        "turns_cpu_s": sum(costs),
        "rendering_s": statistics.median(rendering),
        "generation_s": generation_s,
        "share": statistics.median(rendering) / generation_s,
        "rate": options.rate,
    }


def profile(options: argparse.Namespace) -> None:
    """Print a cProfile; it overstates the cost of small functions."""
    import cProfile
    import pstats

    bench = Bench(options, options.generations, TOKENS, ChatRenderer)
    run_loops(bench.run(bench.tasks(WARM_UP)))
    tasks = bench.tasks(options.at_once)
    profiler = cProfile.Profile()
    profiler.enable()
    run_loops(bench.run(tasks))
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(45)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["episodes", "history", "profile"])
    parser.add_argument("--generations", type=int, default=2)
    parser.add_argument("--at-once", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--observed", choices=["same", "distinct"], default="distinct")
    parser.add_argument("--turns", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64_000)
    parser.add_argument("--rate", type=float, default=50.0, help="tokens/s of one generation")
    parser.add_argument("--template", type=Path, default=SHARED / "chat_templates" / "qwen2_5.jinja")
    add_tokenizer_option(parser)
    options = parser.parse_args()
    if options.kind == "profile":
        profile(options)
        return
    result = measure_episodes(options) if options.kind == "episodes" else measure_history(options)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
