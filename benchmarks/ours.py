"""Our side of `step.py`: `agentloop train` as users run it, and what its own metrics say of a step."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from workload import BATCH, EPISODE_TOKENS, GROUP, LEARNING_RATE, QUICKSTART, TURN_TOKENS, Workload, uses_tool

AGENT, TOOL_AGENT, FIRST_AGENT = "bench_forced_length", "bench_slow_tool", "bench_first_token"
AGENTS = {AGENT: "ForcedLengthAgent", TOOL_AGENT: "SlowToolAgent", FIRST_AGENT: "FirstTokenAgent"}
REWARD = '''"""Differs inside each group, so that no advantage is zero: the same rewards as TRL gets."""


def score(task, text, trajectory):
    return float(trajectory.sample_index % 2)
'''


class Arrivals:
    """When each line of a growing file appeared: the wall clock of a step, what the run leaves out of it included."""

    def __init__(self, path: Path) -> None:
        self.times: list[float] = []
        self._path = path
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Arrivals:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        seen = 0
        while not self._done.wait(0.005):
            try:
                size = self._path.stat().st_size
            except FileNotFoundError:
                continue
            if size > seen:  # a step's line is one write
                seen = size
                self.times.append(time.perf_counter())


def train_command(model: Path, steps: int, folder: Path, extra: list[str], batch: int = BATCH) -> list[str]:
    """The quickstart's recipe with the scenario's rows, model and lengths; how it runs stays as the recipe has it."""
    overrides = {
        "run.dir": folder / "run",
        "run.steps": steps,
        "model.path": model,
        "data.train": folder / "rows.jsonl",
        "data.val": "null",
        "data.shuffle": "false",
        "data.max_prompt_tokens": 256,
        "reward": f"{folder / 'reward.py'}:score",
        "rollout.batch_size": batch,
        "rollout.group_size": GROUP,
        "rollout.sampling.max_new_tokens": TURN_TOKENS,
        "agents.tool_agent.max_assistant_turns": 2,
        "agents.tool_agent.max_response_tokens": EPISODE_TOKENS,
        f"agents.{AGENT}.max_response_tokens": 512,
        "trainer.algorithm.minibatches": 1,
        "trainer.optim": f"{{lr: {LEARNING_RATE}, schedule: constant, warmup_steps: 0, grad_clip: 1.0}}",
        "checkpoint.every": "null",
        "trace.print_every": 0,
    }
    return [
        *(sys.executable, "-P", "-m", "agentloop.commands.main", "train", "--config", str(QUICKSTART / "recipe.yaml")),
        *(f"{key}={value}" for key, value in overrides.items()),
        *extra,
    ]


def measure(
    work: Workload, model: Path, steps: int, warm_up: int, folder: Path, extra: list[str]
) -> list[dict[str, Any]]:
    """Run the command in `folder`; returns the metrics of each step after the warm-up, `wall_s` added.

    `wall_s` is from the end of the step before to its own, as TRL's is.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write_recipe(work, folder)
    command = train_command(model, steps, folder, extra, work.batch)
    path = os.pathsep.join(filter(None, [str(folder / "site"), os.environ.get("PYTHONPATH")]))
    metrics_file = folder / "run" / "metrics.jsonl"
    with Arrivals(metrics_file) as arrivals:
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    lines = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    if len(lines) != steps or len(arrivals.times) != steps:
        raise SystemExit(f"{len(lines)} lines of metrics, {len(arrivals.times)} seen to arrive, for {steps} steps")
    for line, before, after in zip(lines[1:], arrivals.times, arrivals.times[1:], strict=False):
        line["wall_s"] = after - before
    return lines[warm_up:]


def _write_recipe(work: Workload, folder: Path) -> None:
    """Rows, reward, and the agents."""
    rows = []
    for position, row in enumerate(work.rows):
        if uses_tool(work.scenario):
            rows.append(row)
            continue
        group = position % work.batch
        extra = {**row["extra_info"], "lengths": work.lengths[group * GROUP : (group + 1) * GROUP]}
        rows.append({**row, "agent_name": AGENT, "extra_info": extra})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    install_agents(folder / "site")


def install_agents(site: Path) -> None:
    """The agents of `bench_agents.py` as a package on the path `site`: an installed one looks the same."""
    info = site / "agentloop_bench-0.dist-info"
    info.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("bench_agents.py"), site)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: agentloop-bench\nVersion: 0\n", encoding="utf-8")
    agents = "".join(f"{name} = bench_agents:{kind}\n" for name, kind in AGENTS.items())
    (info / "entry_points.txt").write_text(f"[agentloop.agents]\n{agents}", encoding="utf-8")
