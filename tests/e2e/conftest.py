"""Whole commands, as a user runs them."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from agentloop.commands import main as program
from agentloop.runtime.early import AT_EXEC
from agentloop.runtime.variables import child_environment
from agentloop.trace.record import TraceRecord
from agentloop.trace.store import TraceStore
from tests.forked_programs import ForkedPrograms
from trainer.commands import train

IMPORTED = (
    "torch", "transformers.modeling_utils", "transformers.generation.utils",
    "transformers.tokenization_utils_tokenizers", "pandas", "agentloop.config", "trainer.commands.train",
    "trainer.commands.eval", "trainer.commands.sft", "trainer.learner.learner", "rollout_server.launch",
    "rollout_server.engines.torch_engine.create",
)  # fmt: skip
"""What commands and their server and ranks use."""

FEW_ROWS = f"data.train={Path(__file__).with_name('few_rows.py')}:train_rows"

SMALL = [
    FEW_ROWS, "rollout.batch_size=4", "rollout.group_size=4", "eval.max_rows=8", "trainer.algorithm.minibatches=2",
    "checkpoint.every=1", "eval.every=2",
]  # fmt: skip
"""Overrides that make a step of the quickstart take a fraction of a second."""

FINISHED_STEPS = 3


@dataclass
class Run:
    """A finished command and the run directory it wrote."""

    code: int
    out: str
    err: str
    dir: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.dir / "metrics.jsonl").read_text().splitlines()]

    @property
    def train_metrics(self) -> list[dict[str, Any]]:
        return [row for row in self.metrics if "reward/mean" in row]

    def trace(self, step: int, split: str = "train") -> list[dict[str, Any]]:
        return [record.trajectory.to_json() for record in self.records(step, split)]

    def records(self, step: int, split: str = "train") -> list[TraceRecord]:
        return TraceStore(self.dir).records(step, split)


def agentloop_command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "agentloop.commands.main", *arguments]


def run_agentloop(
    cwd: Path, *arguments: str, name: str = "run", env: dict[str, str] | None = None, timeout: float = 300
) -> Run:
    result = subprocess.run(
        agentloop_command(*arguments), capture_output=True, text=True, cwd=cwd, timeout=timeout,
        env={**os.environ, **(env or {})},
    )  # fmt: skip
    return Run(result.returncode, result.stdout, result.stderr, cwd / "outputs" / name)


def train_quickstart(repo: Path, name: str, overrides: tuple[str, ...], *, small: bool = True) -> list[str]:
    """The arguments of `agentloop`."""
    flags = [o for o in overrides if o.startswith("--")]
    keys = [o for o in overrides if not o.startswith("--")]
    recipe = str(repo / "recipes" / "quickstart" / "recipe.yaml")
    return ["train", "--config", recipe, *flags, f"run.name={name}", *(SMALL if small else []), *keys]


WAITING_REWARD = """
import importlib.util
import pathlib
import time

spec = importlib.util.spec_from_file_location("own", {own!r})
own = importlib.util.module_from_spec(spec)
spec.loader.exec_module(own)
calls = 0


def score(row, text, trajectory):
    global calls
    calls += 1
    while calls > {calls} and not pathlib.Path("go").exists():
        pathlib.Path("waits").touch()
        time.sleep(0.05)
    return own.score(row, text, trajectory)
"""


def waiting_reward(repo: Path, folder: Path, *, calls: int) -> str:
    """Return the override for the quickstart's reward, which from call number `calls` on waits for the file `go`.

    The run works in `folder`; the file `waits` is there as soon as it waits.
    """
    own = str(repo / "recipes" / "quickstart" / "reward.py")
    (folder / "waiting.py").write_text(WAITING_REWARD.format(own=own, calls=calls))
    return f"reward={folder}/waiting.py:score"


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedPrograms]:
    """Runs `agentloop` in processes that need not import torch, transformers and the trainer again."""
    folder = tmp_path_factory.mktemp("commands")
    made = ForkedPrograms(*IMPORTED, environment=child_environment(1), folder=folder)
    yield made
    made.close()


@pytest.fixture(scope="session")
def run_forked(commands: ForkedPrograms) -> Callable[..., Run]:
    """Run `agentloop ...` in a folder and wait for its end: `run_agentloop` without its imports.

    What a program reads as it starts is fixed in those that are forked: given such a variable, it is started.
    """

    def run(
        cwd: Path, *arguments: str, name: str = "run", env: dict[str, str] | None = None, timeout: float = 300
    ) -> Run:
        if not {*AT_EXEC}.isdisjoint(env or {}):
            return run_agentloop(cwd, *arguments, name=name, env=env, timeout=timeout)
        environment = {**os.environ, **(env or {})}
        program = Path(__file__).with_name("forked_importer.py")
        done = commands.run(program, *arguments, environment=environment, cwd=cwd, timeout=timeout)
        return Run(done.returncode, done.stdout, done.stderr, cwd / "outputs" / name)

    return run


@pytest.fixture
def agentloop(tmp_path: Path, run_forked: Callable[..., Run]) -> Callable[..., Run]:
    """Run `agentloop ...` in an empty folder and wait for its end."""
    return functools.partial(run_forked, tmp_path)


@pytest.fixture
def quickstart(repo: Path, agentloop: Callable[..., Run]) -> Callable[..., Run]:
    """Run the quickstart, small unless told otherwise, under the run name `run`."""

    def run(*overrides: str, small: bool = True, name: str = "run", **options: Any) -> Run:
        return agentloop(*train_quickstart(repo, name, overrides, small=small), name=name, **options)

    return run


@pytest.fixture
def refused(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Run]:
    """Run the small quickstart in this process, for what ends before it starts others: those would import torch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "importing", contextlib.nullcontext)
    monkeypatch.setattr(train, "early_programs", lambda _programs: contextlib.nullcontext())

    def run(*overrides: str) -> Run:
        monkeypatch.setattr(sys, "argv", ["agentloop", *train_quickstart(repo, "run", overrides)])
        with pytest.raises(SystemExit) as ended:
            program.main()
        out, err = capsys.readouterr()
        return Run(int(ended.value.code or 0), out, err, tmp_path / "outputs" / "run")

    return run


@pytest.fixture(scope="session")
def finished(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The small quickstart after `FINISHED_STEPS` steps, for all tests that only look at a run.

    One for all processes of pytest-xdist: the first that needs it makes it, the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished"
    folder.mkdir(exist_ok=True)
    printed = folder / "printed.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            run = run_agentloop(folder, *train_quickstart(repo, "run", (f"run.steps={FINISHED_STEPS}",)))
            assert run.code == 0, run.err
            printed.write_text(json.dumps([run.out, run.err]))
    out, err = json.loads(printed.read_text())
    return Run(0, out, err, folder / "outputs" / "run")


class Background:
    """A command that goes on while the test does something to it."""

    def __init__(self, arguments: list[str], cwd: Path) -> None:
        self.process = subprocess.Popen(
            agentloop_command(*arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd,
        )
        self.dir = cwd / "outputs" / "run"

    def wait_for_steps(self, count: int, timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            file = self.dir / "metrics.jsonl"
            if file.exists() and sum("reward/mean" in line for line in file.read_text().splitlines()) >= count:
                return
            if self.process.poll() is not None:
                raise AssertionError(f"ended early with {self.process.returncode}:\n{self.process.communicate()[0]}")
            time.sleep(0.02)
        raise AssertionError(f"no {count} steps within {timeout} s")

    def children(self, *words: str) -> list[psutil.Process]:
        """Descendants whose command line holds one of `words`."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                line = " ".join(child.cmdline())
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            if any(word in line for word in words):
                found.append(child)
        return found

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """End the run, its server and its ranks at once, as the machine would."""
        processes = [psutil.Process(self.process.pid), *self.children("rollout_server", "trainer.learner.process")]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes[1:]):
            time.sleep(0.01)
        self.process.communicate()

    def finish(self, timeout: float = 120) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, out


@pytest.fixture
def background(tmp_path: Path, repo: Path) -> Any:
    """Start the small quickstart in the background; whatever is left of it is killed at the end of the test."""
    started: list[Background] = []

    def start(*overrides: str) -> Background:
        run = Background(train_quickstart(repo, "run", overrides), tmp_path)
        started.append(run)
        return run

    yield start
    for run in started:
        if run.process.poll() is None:
            for child in run.children(""):
                child.kill()
            run.process.kill()
            run.process.communicate()
