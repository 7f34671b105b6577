"""Measure agent workers: how tools that compute scale with them, and what their boundary costs.

    python benchmarks/workers.py [--json FILE]

Real: `WorkerPool` and its processes, `EpisodeRunner`, `ToolAgent`, the quickstart's tokenizer and template, the HTTP
client. Fake: the engine, a server that answers at once (canned_server.py). An episode samples twice and calls one tool
in between.

scaling   episodes a second with a tool that computes for 2 ms in Python, with 0, 1 and 2 workers
boundary  CPU of the main process an episode that a worker runs
crowd     16,384 episodes at once over 4 workers: the share of a core that the main process takes, and its lag

Exit code 1: a bound is not met.
"""

from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from material import REPO
from quick import QUICK, add_quick_option, expect
from quiet import OtherLoad

from agentloop.agent.code import RunCode, load_renderer, run_client
from agentloop.config import Recipe, SamplingConfig
from agentloop.runtime.event_loop import run_loops
from agentloop.runtime.lag import LoopLagMonitor
from agentloop.types import EpisodeStatus, Task
from agentloop.worker.pool import WorkerPool

MODEL = REPO / "recipes" / "quickstart" / "model"
GROUP = 8
TURN_TOKENS = 64

BOUND_SCALING = 1.8
"""Episodes a second with two workers over those with none, on two cores."""

BOUND_US = 60.0
"""CPU of the main process an episode, in microseconds. That the bytes of its columns are copied once is a test
(tests/agentloop/worker/test_episodes.py)."""

TOOL = """
import time

from agentloop.tool.base import Tool
from agentloop.types import ToolResult


class Compute(Tool):
    async def execute(self, state, arguments, **kwargs):
        end = time.thread_time() + self.config["compute_s"]
        while time.thread_time() < end:
            pass
        return ToolResult("408")


async def score(row, text, trajectory):
    return 1.0
"""

TOOLS = """
tools:
  - class_name: {folder}/own.py:Compute
    config: {{type: native, compute_s: {compute_s}}}
    tool_schema:
      type: function
      function:
        name: calculator
        description: Evaluate an arithmetic expression.
        parameters: {{type: object, properties: {{expression: {{type: string}}}}, required: [expression]}}
"""

CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "12 * 34"}}\n</tool_call><|im_end|>'


def recipe(folder: Path, *, workers: int, compute_s: float) -> Recipe:
    """Return the recipe of a measurement."""
    (folder / "own.py").write_text(TOOL)
    (folder / "tools.yaml").write_text(TOOLS.format(folder=folder, compute_s=compute_s))
    limits = {"max_assistant_turns": 3, "max_response_tokens": 10**6}
    return Recipe.model_validate(
        {
            "run": {"steps": 1},
            "model": {"path": str(MODEL)},
            "data": {"train": "unused.jsonl"},
            "agents": {"tool_agent": limits},
            "tools": str(folder / "tools.yaml"),
            "reward": {"function": f"{folder}/own.py:score", "run_in": "inline"},
            "cluster": {"agents": {"workers": workers}},
        }
    )


@contextlib.contextmanager
def canned(folder: Path, delay_s: float = 0.0, turn_tokens: int = TURN_TOKENS) -> Iterator[str]:
    """Yield the URL of a server whose sessions call the tool and then answer."""
    encode = load_renderer(recipe(folder, workers=0, compute_s=0).model, str(MODEL)).tokenizer.backend_tokenizer.encode
    turns = []
    for text in (CALL, "It is 408.<|im_end|>"):
        end = encode(text, add_special_tokens=False).ids
        turns.append([*encode("1 + 2 " * turn_tokens, add_special_tokens=False).ids[: turn_tokens - len(end)], *end])
    file = folder / "answers.json"
    file.write_text(json.dumps({"turns": turns, "context_length": 4096, "delay_s": delay_s}))
    command = [sys.executable, str(REPO / "benchmarks" / "canned_server.py"), str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.kill()


@contextlib.asynccontextmanager
async def runner(folder: Path, url: str, *, workers: int, compute_s: float, at_once: int) -> AsyncIterator[Any]:
    """Yield what runs episodes: a pool of workers, or the runner of this process."""
    made = recipe(folder, workers=workers, compute_s=compute_s)
    if workers:
        async with WorkerPool(made, str(MODEL), log_dir=folder / "logs", warn=_warn) as pool:
            await pool.serve(url, token=None, context_length=4096, max_in_flight=at_once)
            yield pool
        return
    code = RunCode.load(made)
    client = run_client(made.rollout, url, token=None, max_in_flight=at_once)
    agents = {"tool_agent": code.agents.get("tool_agent", "the rows")}
    renderer = load_renderer(made.model, str(MODEL))
    try:
        yield code.runner(made, renderer, client, agents=agents, context_length=4096)
    finally:
        code.close()
        await client.close()


def _warn(text: str) -> None:
    if "blocked the event loop" not in text:  # which is what the tool is for
        print(text, file=sys.stderr)


def tasks(name: str, episodes: int) -> list[Task]:
    """Return the rows of episodes; a group of 8 shares one."""
    rows = [
        Task(f"{name}{number}", "tool_agent", [{"role": "user", "content": f"What is {number} * 34?"}])
        for number in range(-(-episodes // GROUP))
    ]
    return [rows[number // GROUP] for number in range(episodes)]


async def run(found: Any, rows: list[Task], at_once: int, turn_tokens: int = TURN_TOKENS) -> int:
    """Run an episode of each row, `at_once` at a time; return the tokens of all."""
    slots, sampling, tokens = asyncio.Semaphore(at_once), SamplingConfig(max_new_tokens=turn_tokens), 0

    async def one(number: int, task: Task) -> None:
        nonlocal tokens
        async with slots:
            (trajectory,) = await found.run(
                task, group_id=task.task_id, sample_index=number % GROUP, sampling=sampling, seed=1
            )
        if trajectory.status is not EpisodeStatus.OK or len(trajectory.turns) != 2 or trajectory.reward != 1.0:
            raise SystemExit(
                f"an episode ended {trajectory.status} in turn {len(trajectory.turns)}: {trajectory.error}"
            )
        tokens += len(trajectory)

    await asyncio.gather(*(one(number, task) for number, task in enumerate(rows)))
    return tokens


async def scaling(folder: Path, url: str, workers: int, episodes: int, turn: int) -> dict[str, float]:
    """Return episodes a second with a tool that computes for 2 ms.

    Args:
        turn: number of the round: the server knows sessions by their names.
    """
    async with runner(folder, url, workers=workers, compute_s=0.002, at_once=64) as found:
        await run(found, tasks(f"warm{turn}-{workers}-", 64), 64)
        begin = time.perf_counter()
        await run(found, tasks(f"scale{turn}-{workers}-", episodes), 64)
        return {"episodes_per_s": episodes / (time.perf_counter() - begin)}


async def boundary(folder: Path, url: str, episodes: int) -> dict[str, float]:
    """Return what an episode in a worker costs the main process."""
    async with runner(folder, url, workers=1, compute_s=0.0, at_once=64) as found:
        await run(found, tasks("warm-", 64), 64)
        cpu = time.process_time()
        tokens = await run(found, tasks("cost-", episodes), 64)
        cpu = time.process_time() - cpu
        return {"us_episode": 1e6 * cpu / episodes, "tokens_episode": tokens / episodes}


async def crowd(folder: Path, url: str, episodes: int, workers: int) -> dict[str, float]:
    """Return how busy the main process is with many episodes at once."""
    async with runner(folder, url, workers=workers, compute_s=0.0, at_once=episodes) as found:
        rows = tasks("crowd-", episodes)
        with LoopLagMonitor() as lag:
            cpu, begin = time.process_time(), time.perf_counter()
            await run(found, rows, episodes)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - begin
        return {"share": cpu / wall, "episodes_per_s": episodes / wall, "lag_max_s": lag.take()["loop/lag_max_s"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the scaling, in turns; the medians count")
    add_quick_option(parser)
    options = parser.parse_args()
    episodes, many, rounds = (64, 256, 1) if options.quick else (2_000, 16_384, options.rounds)

    with OtherLoad() as load, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with canned(folder) as url:
            measured: dict[int, list[float]] = {0: [], 1: [], 2: []}
            for turn in range(rounds):
                for workers, found in measured.items():
                    found.append(run_loops(scaling(folder, url, workers, episodes, turn))["episodes_per_s"])
            cost = run_loops(boundary(folder, url, 2 * episodes))
        with canned(folder, delay_s=2.0) as url:
            busy = run_loops(crowd(folder, url, many, 4))
    rates = {workers: sorted(found)[len(found) // 2] for workers, found in measured.items()}
    expect("tokens sampled an episode, at least", cost["tokens_episode"] > 2 * TURN_TOKENS, True)

    print("| workers | episodes/s | of 0 workers |\n|---:|---:|---:|")
    for workers, rate in rates.items():
        print(f"| {workers} | {rate:,.0f} | {rate / rates[0]:.2f} |")
    print(f"\nboundary: {cost['us_episode']:.0f} us of CPU of the main process an episode")
    print(
        f"crowd: {many:,} episodes at once over 4 workers: {busy['episodes_per_s']:,.0f} a second, the main process "
        f"takes {100 * busy['share']:.0f}% of a core, late by {1e3 * busy['lag_max_s']:.0f} ms at most"
    )
    if load.cores is not None:
        print(f"others used {load.cores:.2f} cores")
    if options.json:
        options.json.write_text(json.dumps({"rates": rates, "boundary": cost, "crowd": busy}, indent=1))
    if options.quick:
        print(QUICK)
        return 0
    met = rates[2] >= BOUND_SCALING * rates[0] and cost["us_episode"] <= BOUND_US
    print("bounds met" if met else f"MISSED: {BOUND_SCALING} times at 2 workers, {BOUND_US:.0f} us")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
