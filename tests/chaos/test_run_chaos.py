"""A whole run under kills, stops, damage, a full disk and second starters: it is the undisturbed run, to the bit.

`make chaos` runs it for ten minutes, CI for 30 seconds. CHAOS_SEED repeats the order of the incidents.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from agentloop.trace.store import TraceStore
from trainer.publishing.weights_folder import choose_path

SECONDS = float(os.environ.get("CHAOS_SECONDS", "30"))
WAIT_S = 240.0
"""Limit of each wait; only a run that hangs reaches it."""

FEWEST = 3
"""Incidents of a chaos on a machine where starts take long."""

STOPS_FROM_S = 120.0
"""A shorter chaos has no SIGSTOPs: each is noticed after 20 seconds."""

BATCH, GROUP = 4, 4
ROWS = Path(__file__).parents[1] / "e2e" / "few_rows.py"
OPTIONS = [
    f"data.train={ROWS}:train_rows",
    "run.steps=100000", f"rollout.batch_size={BATCH}", f"rollout.group_size={GROUP}", "eval.max_rows=8", "eval.every=4",
    "checkpoint.every=1", "checkpoint.keep=3", "rollout.replicas=2", "rollout.max_restarts=1000",
    "rollout.max_running=12", "trainer.algorithm.minibatches=2", "trainer.optim.schedule=constant",
    "trainer.optim.lr_end=null", "tools=recipe/tools.yaml", "trace.print_every=0",
]  # fmt: skip

TOOL = '''
def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression.

    Args:
        expression: For example 12 * (3 + 4).
    """
    from tools.calculator import evaluate

    return str(evaluate(expression))
'''
TOOLS = "tools: [{class_name: ./tool.py:calculator, config: {run_in: process, workers: 2}}]\n"


class Started:
    """One `agentloop train`, and what it printed."""

    def __init__(self, recipe: Path, cwd: Path, *, resume: bool, workers: int = 0) -> None:
        overrides = [*OPTIONS, f"cluster.agents.workers={workers}", *(["--resume"] if resume else [])]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "agentloop.commands.main", "train", "--config", str(recipe), *overrides],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.out = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        # A pipe, which the limit of file sizes that stands for a full disk does not hold for.
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.out += line

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def steps(self) -> int:
        """Number of steps that this process has trained."""
        return len(re.findall(r"^ +\d+/100000 ", self.out, re.MULTILINE))

    def wait_for_a_step(self) -> None:
        before = self.steps
        self.wait_for(lambda: self.steps > before)

    def wait_for_the_end_or_a_step(self) -> None:
        before, deadline = self.steps, time.monotonic() + WAIT_S
        while self.alive and self.steps == before:
            assert time.monotonic() < deadline, f"it hangs:\n{self.out}"
            time.sleep(0.05)

    def wait_for(self, what: Callable[[], object]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not what():
            assert self.alive, f"it ended:\n{self.out}"
            assert time.monotonic() < deadline, f"it hangs:\n{self.out}"
            time.sleep(0.05)

    def children(self, *words: str) -> list[psutil.Process]:
        """Living descendants whose command line holds all `words`."""
        found = []
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if all(word in " ".join(child.cmdline()) for word in words):
                        found.append(child)
        return found

    def wait(self) -> int:
        code = self.process.wait(WAIT_S)
        self._reader.join(10)
        return code


class RunChaos:
    """One run directory, and everything that is done to it."""

    def __init__(self, folder: Path, repo: Path, seed: int, *, disturbed: bool) -> None:
        self.folder = folder
        self.disturbed = disturbed
        shutil.copytree(repo / "recipes" / "quickstart", folder / "recipe")
        (folder / "recipe" / "tool.py").write_text(TOOL)
        (folder / "recipe" / "tools.yaml").write_text(TOOLS)
        self.dir = folder / "outputs" / "quickstart"
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.pids: set[int] = set()
        self.starts: list[Started] = []
        self._bag: list[Callable[[Started], bool]] = []

    # -- the run ---------------------------------------------------------------------------------------

    def start(self) -> Started:
        resume = (self.dir / "metrics.jsonl").exists()
        workers = self.random.choice((0, 2)) if self.disturbed else 0
        started = Started(Path("recipe/recipe.yaml"), self.folder, resume=resume, workers=workers)
        self.starts.append(started)
        return started

    def steps(self) -> int:
        """The last step with a line in metrics.jsonl."""
        return max((row["step"] for row in self.rows() if "reward/mean" in row), default=0)

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        with contextlib.suppress(FileNotFoundError):
            for line in (self.dir / "metrics.jsonl").read_text(errors="replace").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    rows.append(json.loads(line))
        return rows

    def run(self) -> None:
        """Disturb the run until the time is over, then stop it as a user does."""
        end = time.monotonic() + SECONDS
        started = self.start()
        while time.monotonic() < end or self.done.total() < FEWEST:
            if not started.alive:
                started = self.start()
            if self.random.random() < 0.2:  # some incidents meet the start
                time.sleep(self.random.random() * 6)
            else:
                started.wait_for_a_step()
                time.sleep(self.random.random() * 0.5)
            self.pids |= {child.pid for child in started.children("")}
            self.next_incident()(started)
        if not started.alive:
            started = self.start()
        started.wait_for_a_step()
        self.pids |= {child.pid for child in started.children("")}
        started.process.send_signal(signal.SIGINT)
        assert started.wait() == 130, started.out

    def next_incident(self) -> Callable[[Started], bool]:
        if not self._bag:
            self._bag = [
                self.kill_main, self.kill_rank, self.kill_server, self.kill_replica, self.kill_tool_worker,
                self.kill_agent_worker,
                self.damage_checkpoint, self.tear_metrics, self.fill_disk, self.start_twice, self.hang_up,
            ]  # fmt: skip
            if SECONDS >= STOPS_FROM_S:
                self._bag += [self.stop_rank, self.stop_server, self.stop_replica]
            self.random.shuffle(self._bag)
        return self._bag.pop()

    # -- incidents -------------------------------------------------------------------------------------

    def count(self, name: str) -> bool:
        self.done[name] += 1
        return True

    def signal_one(self, started: Started, number: int, *words: str) -> psutil.Process | None:
        victims = started.children(*words)
        if not victims:
            return None
        victim = self.random.choice(victims)
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(number)
        return victim

    def ends_with_an_error(self, started: Started, *names: str) -> None:
        """The run ends by itself, with one named error and no traceback."""
        code = started.wait()
        assert code in (1, 2), (code, started.out)
        assert re.search("|".join(names), started.out), started.out

    def goes_on_or_ends(self, started: Started, *names: str) -> None:
        """The run goes on from its last checkpoint; or it ends, if it had not trained a step since it began."""
        before = started.out.count("goes on by itself")
        started.wait_for(lambda: not started.alive or started.out.count("goes on by itself") > before)
        if started.alive:
            assert re.search("|".join(names), started.out), started.out
            started.wait_for_the_end_or_a_step()
        elif started.process.returncode != 130:  # a Ctrl-C came with the signal
            self.ends_with_an_error(started, *names)

    def kill_main(self, started: Started) -> bool:
        started.process.kill()
        started.wait()
        return self.count("main killed")

    def kill_rank(self, started: Started) -> bool:
        in_use = started.steps > 0
        if self.signal_one(started, signal.SIGKILL, "trainer.learner.process") is None:
            return False
        if not in_use:
            # A process that dies while it imports ahead is replaced, and the run goes on.
            started.wait_for_the_end_or_a_step()
            if started.alive:
                return self.count("rank killed ahead of its use")
        self.goes_on_or_ends(started, r"trainer rank 0 died \(exit code -9\)")
        return self.count("rank killed")

    def kill_agent_worker(self, started: Started) -> bool:
        if not started.steps or self.signal_one(started, signal.SIGKILL, "agentloop.worker") is None:
            return False
        return self.count("agent worker killed")

    def kill_server(self, started: Started) -> bool:
        if not started.steps or self.signal_one(started, signal.SIGKILL, "server.settings.json") is None:
            return False
        return self.count("server killed")

    def kill_replica(self, started: Started) -> bool:
        if not started.steps or self.signal_one(started, signal.SIGKILL, "rollout_server", "replica") is None:
            return False
        return self.count("replica killed")

    def kill_tool_worker(self, started: Started) -> bool:
        if self.signal_one(started, signal.SIGKILL, "process_worker") is None:
            return False
        return self.count("tool worker killed")

    def damage_checkpoint(self, started: Started) -> bool:
        """Damage the newest checkpoint of a killed run: it is told, and the one before is used."""
        self.kill_main(started)
        checkpoints = self.checkpoints()
        if len(checkpoints) < 2:
            return False
        files = [path for path in checkpoints[-1].rglob("*") if path.is_file() and path.name != "groups.parquet"]
        file = self.random.choice(files)
        data = bytearray(file.read_bytes())
        how = self.random.choice(("cut", "flip", "gone"))
        if how == "gone":
            file.unlink()
        elif how == "cut":
            file.write_bytes(data[: len(data) // 2])
        else:
            data[len(data) // 2] ^= 0xFF
            file.write_bytes(data)
        again = self.start()
        again.wait_for(lambda: "goes on from step" in again.out)
        assert f"step_{checkpoints[-1].name.removeprefix('step_')} is damaged" in again.out, again.out
        self.kill_main(again)
        return self.count("checkpoint damaged")

    def tear_metrics(self, started: Started) -> bool:
        self.kill_main(started)
        with contextlib.suppress(FileNotFoundError), (self.dir / "metrics.jsonl").open("r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(b'{"step": 99, "rew' if self.random.random() < 0.5 else b'[1]\n{"loss": 2}\n')
        return self.count("metrics torn")

    def fill_disk(self, started: Started) -> bool:
        """A limit of file sizes stands for the full disk: every write of a file fails."""
        if not started.steps:
            return False
        victims = [psutil.Process(started.process.pid), *started.children("trainer.learner.process")]
        with contextlib.suppress(psutil.NoSuchProcess):
            for victim in victims:
                victim.rlimit(psutil.RLIMIT_FSIZE, (1, psutil.RLIM_INFINITY))
        self.ends_with_an_error(started, r"could not be written: .*MB free on its disk")
        assert not choose_path(self.dir / "weights", None, local=True).exists(), started.out
        return self.count("disk filled")

    def start_twice(self, started: Started) -> bool:
        if not (self.dir / ".lock").exists() or not (self.dir / "metrics.jsonl").exists() or not started.alive:
            return False
        second = self.start()
        code = second.wait()
        assert code == 2 and f"in use by process {started.process.pid}" in second.out, second.out
        return self.count("started twice")

    def hang_up(self, started: Started) -> bool:
        """Close the terminal of a run that is past its start: it saves a checkpoint."""
        if not started.steps:
            return False
        started.process.send_signal(self.random.choice((signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM)))
        assert started.wait() == 130, started.out
        return self.count("hung up")

    def stop_rank(self, started: Started) -> bool:
        if not started.steps or self.signal_one(started, signal.SIGSTOP, "trainer.learner.process") is None:
            return False
        if self.random.random() < 0.5:
            time.sleep(self.random.random())
            started.process.send_signal(signal.SIGINT)  # one Ctrl-C ends it
        self.goes_on_or_ends(started, r"trainer rank 0 \(process \d+\) was stopped for 2\d s during \w+")
        return self.count("rank stopped")

    def stop_server(self, started: Started) -> bool:
        if not started.steps or self.signal_one(started, signal.SIGSTOP, "server.settings.json") is None:
            return False
        started.wait_for(lambda: "was stopped for" in started.out)
        assert re.search(r"rollout server \(process \d+\) was stopped for 2\d s", started.out), started.out
        return self.count("server stopped")

    def stop_replica(self, started: Started) -> bool:
        if not started.steps or self.signal_one(started, signal.SIGSTOP, "rollout_server", "replica") is None:
            return False
        return self.count("replica stopped")

    # -- what is there ---------------------------------------------------------------------------------

    def checkpoints(self) -> list[Path]:
        found = [path for path in self.dir.glob("checkpoints/step_*") if path.name.removeprefix("step_").isdigit()]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    ends, others = ("time_s", "tokens_per_s", "wait_s"), ("loop/", "workers/")
    return {k: v for k, v in row.items() if not k.endswith(ends) and not k.startswith(others)}


def traces(run: Path, step: int) -> list[tuple[Any, ...]]:
    lines = [record.trajectory.to_json() for record in TraceStore(run).records(step, "train")]
    keys = ("group_id", "sample_index", "token_ids", "loss_mask", "logprobs", "versions", "reward", "status")
    return [tuple(json.dumps(line.get(key)) for key in keys) for line in lines]


@pytest.mark.chaos
def test_a_run_that_everything_happens_to_is_the_undisturbed_run(tmp_path: Path, repo: Path) -> None:
    seed = int(os.environ.get("CHAOS_SEED", time.time_ns() % 2**32))
    print(f"CHAOS_SEED={seed}")
    (tmp_path / "chaos").mkdir()
    (tmp_path / "calm").mkdir()
    chaos = RunChaos(tmp_path / "chaos", repo, seed, disturbed=True)
    calm = RunChaos(tmp_path / "calm", repo, seed, disturbed=False)
    try:
        chaos.run()
        last = chaos.steps()
        undisturbed = calm.start()
        undisturbed.wait_for(lambda: calm.steps() >= last)
        undisturbed.process.send_signal(signal.SIGINT)
        assert undisturbed.wait() == 130, undisturbed.out
    finally:
        for started in (*chaos.starts, *calm.starts):
            started.process.kill()
            started.wait()

    print(f"{len(chaos.starts)} starts, {last} steps; {dict(chaos.done)}")
    assert "Traceback" not in "".join(started.out for started in chaos.starts)
    ours, theirs = ([row for row in run.rows() if row["step"] <= last] for run in (chaos, calm))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for mine, undisturbed_row in zip(ours, theirs, strict=True):
        assert without_times(mine) == without_times(undisturbed_row)
    for step in range(1, last + 1):
        episodes = traces(chaos.dir, step)
        assert len(episodes) == len({episode[:2] for episode in episodes}) == BATCH * GROUP, f"step {step}"
        assert episodes == traces(calm.dir, step)
    left = [pid for pid in chaos.pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
    assert not left, "a process is left"
    assert not choose_path(chaos.dir / "weights", None, local=True).exists()
