"""`agentloop eval`: evaluate a model or a run's checkpoint, without training."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shlex
import shutil
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
from rich import box
from rich.console import Console as RichConsole
from rich.table import Table

from agentloop.client.open_files import shortage
from agentloop.commands.provenance import environment
from agentloop.commands.recipes import find_config
from agentloop.config import Recipe
from agentloop.config.loading import load_config
from agentloop.errors import ConfigError, RunDirError, ServerStartError, WorkerError
from agentloop.files import is_file, real_path, write_atomic
from agentloop.model_folder import ModelFolder, check_tensors
from agentloop.runtime.child import child_environment, log_tail, spawn
from agentloop.runtime.early import early_programs
from agentloop.runtime.event_loop import run_loops
from agentloop.text import counted, finite, number
from agentloop.trace.exporting import ExportRun, load_destinations
from agentloop.trace.sender import SpanSender
from agentloop.trace.store import TraceStore
from trainer.checkpoint_files import read_state
from trainer.commands.export import BEST, LAST, find_checkpoint
from trainer.commands.train import EXIT_INTERRUPTED, open_sender
from trainer.console.console import Console
from trainer.publishing.server_process import ServerProcess, check_port, early_server
from trainer.rollouts.error_log import ErrorLog
from trainer.run.evaluation import Evaluation
from trainer.run.preflight import RunInputs, prepare
from trainer.run.rundir import RunDir
from trainer.run.traces import RunTraces

PLAIN_COLUMNS = 200
"""Width of the table when the output is not a terminal."""

RESULT_FILE = "eval.json"

MODEL = "model"
"""Label of the recipe's model with its own weights."""

COUNTS = ("episodes", "failed")
ENDS = ("tool_calls_mean", "tool_errors_mean", "response_tokens_mean")
HEADS = {
    "reward_mean": "reward", "tool_calls_mean": "tools", "tool_errors_mean": "errors", "response_tokens_mean": "tokens",
}  # fmt: skip
"""The table's first and last columns, and the headings. `eval.n` decides the columns between."""


@dataclass(frozen=True)
class Subject:
    """The weights to evaluate: the recipe's model unchanged, a checkpoint, or a weights folder."""

    label: str
    step: int = 0
    version: int = 0
    checkpoint: Path | None = None
    weights: Path | None = None


def eval_command(config: Path, overrides: list[str], *, checkpoint: str | None, out: Path | None) -> int:
    """Run `agentloop eval`; return the exit code.

    Raises:
        AgentloopError: the evaluation cannot start, or failed.
    """
    recipe = load_config(Recipe, find_config(config), overrides)
    if recipe.data.val is None:
        raise ConfigError("data.val is not set: there are no rows to evaluate", "set data.val")
    subject = find_subject(recipe, checkpoint)
    run_dir = RunDir(_folder_for(recipe, subject, out))
    run_dir.check_writable()
    console = Console()
    load_destinations(recipe.trace, ExportRun.of(recipe, run_dir.root))  # refused here, before anything starts
    with early_programs([] if recipe.rollout.url is not None else [early_server(recipe.rollout)]):
        return _run(recipe, run_dir, console, subject)


def _run(recipe: Recipe, run_dir: RunDir, console: Console, subject: Subject) -> int:
    """Check the recipe, evaluate and print; return the exit code."""
    inputs = prepare(recipe, console, train=False)
    if subject.label == MODEL:  # of a recipe that takes the adapters of another run further: with these
        subject = replace(subject, checkpoint=inputs.adapters)
    check_port(recipe.rollout.host, recipe.rollout.port)
    with run_dir.claimed(warn=console.warn):
        for folder in (run_dir.logs, run_dir.traces):
            folder.mkdir(parents=True, exist_ok=True)
        sender = open_sender(recipe, run_dir, console)
        try:
            metrics = run_loops(_evaluate(recipe, inputs, run_dir, console, subject, sender))
        except ServerStartError:
            # The likeliest cause is a tensor that does not fit. Comparing takes seconds: only now.
            if recipe.rollout.url is None:
                check_tensors(ModelFolder(Path(inputs.model_path)), trust_remote_code=recipe.model.trust_remote_code)
            raise
        except (asyncio.CancelledError, KeyboardInterrupt):
            console.close()
            console.notice("stopped: no result was written")
            return EXIT_INTERRUPTED
        finally:
            sender.close()
        _write(recipe, run_dir, subject, metrics)
    console.close()
    _print(metrics)
    console.notice(f"numbers {run_dir.root / 'eval.json'}")
    trace = TraceStore(run_dir.root).path(subject.step, "eval")
    if trace.is_file():
        console.notice(f"trace   {trace}")
        console.notice(kept_text(run_dir.root, subject.step, metrics.get("eval/episodes")))
    return 0


def kept_text(run: Path, step: int, episodes: Any) -> str:
    """Return the command that lists the traced episodes, and how many of all they are.

    Args:
        episodes: how many were evaluated; None: unknown.
    """
    kept = sum(record.is_main for record in TraceStore(run).iterate(step, "eval"))
    total = finite(episodes)
    some = ""
    if total is not None and kept < total:
        some = f"   {counted(int(total), 'episode')}, {kept:,} kept: eval.log_generations"
    return f"episodes agentloop trace list {shlex.quote(str(run))}{some}"


def _write(recipe: Recipe, run_dir: RunDir, subject: Subject, metrics: dict[str, Any]) -> None:
    result = {
        "model": recipe.model.path,
        "checkpoint": str(weights) if (weights := subject.checkpoint or subject.weights) is not None else None,
        **metrics,
        "config": recipe.plain(),
        "env": environment(),
    }
    write_atomic(run_dir.root / RESULT_FILE, orjson.dumps(result, option=orjson.OPT_INDENT_2))


def _folder_for(recipe: Recipe, subject: Subject, out: Path | None) -> Path:
    """Return the folder of the results; an earlier evaluation is kept.

    Raises:
        RunDirError: `--out` holds an evaluation.
    """
    if out is not None:
        if is_file(out / RESULT_FILE):
            raise RunDirError(f"--out {out} already holds an evaluation", "give another folder, or move that one away")
        return out
    first = recipe.run_dir / "evaluations" / subject.label
    numbered = (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))
    return next(folder for folder in itertools.chain([first], numbered) if not is_file(folder / RESULT_FILE))


def find_subject(recipe: Recipe, checkpoint: str | None) -> Subject:
    """Find the weights that `--checkpoint` names.

    Args:
        checkpoint: a step of the recipe's run, `last` or `best`; or the folder of a run, of a
            checkpoint, or of safetensors.

    Raises:
        RunDirError: there is no such checkpoint.
        ConfigError: the recipe uses a running server, whose weights cannot be chosen.
    """
    if checkpoint is None:
        return Subject(MODEL)
    if recipe.rollout.url is not None:
        raise ConfigError(
            "--checkpoint cannot be combined with rollout.url: the weights of a running server are not changed",
            "set rollout.url to null, or omit --checkpoint",
        )
    folder = real_path(Path(checkpoint))
    if checkpoint.isdecimal() or checkpoint in (LAST, BEST):
        found = find_checkpoint(recipe.run_dir, checkpoint)
    elif (model := ModelFolder(folder)).has_config and model.has_weights:
        return Subject(folder.name, weights=folder)
    else:
        found = find_checkpoint(folder, None)
    version = read_state(found.path)["version"]
    return Subject(f"step_{found.step}", found.step, version, found.path.resolve())


async def _evaluate(
    recipe: Recipe, inputs: RunInputs, run_dir: RunDir, console: Console, subject: Subject, sender: SpanSender
) -> dict[str, Any]:
    async with (
        inputs.workers(run_dir.logs, console.warn) as workers,  # they start beside the server
        _server(recipe, inputs, run_dir, console, subject) as (url, token),
    ):
        most = _most(recipe)
        if warning := shortage(most):
            console.warn(warning)
        errors = ErrorLog(run_dir.logs / "errors.jsonl", console.warn)
        async with inputs.runner(url, token=token, max_in_flight=most, on_fault=errors, workers=workers) as runner:
            traces = RunTraces(
                run_dir.root, recipe.trace, seed=recipe.seed, total_steps=0, notice=console.notice, sender=sender
            )
            evaluation = Evaluation(
                recipe,
                runner,
                inputs.val,
                run_dir,
                console,
                total_steps=0,
                record=lambda _, amend=False: None,
                traces=traces,
            )
            try:
                metrics = await evaluation.measure(subject.step, subject.version)
                await traces.settle()
                return metrics
            finally:
                await traces.close()


def _most(recipe: Recipe) -> int:
    """Return how many episodes are in flight at most."""
    return recipe.eval.max_concurrent or recipe.rollout.max_concurrent


@contextlib.asynccontextmanager
async def _server(
    recipe: Recipe, inputs: RunInputs, run_dir: RunDir, console: Console, subject: Subject
) -> AsyncIterator[tuple[str, str | None]]:
    """Yield URL and token of a server with the weights: `rollout.url`, or a new server."""
    if recipe.rollout.url is not None:
        yield recipe.rollout.url, recipe.rollout.token
        return
    weights = subject.weights
    exported = run_dir.root / "exported"
    server = ServerProcess(
        model_path=inputs.model_path,
        model=recipe.model,
        rollout=recipe.rollout,
        seed=recipe.seed_for("rollout"),
        log_file=run_dir.logs / "server.log",
        weights_roots=[exported, *([weights] if weights else [])],
        on_restart=console.warn,
        connections=_most(recipe) * max(1, recipe.cluster.agents.workers),
    )
    try:
        if subject.checkpoint is not None:
            weights = exported / f"v_{subject.version}"
            whose = "the adapters" if subject.label == MODEL else f"checkpoint of step {subject.step}"
            with console.phase(f"load {whose}"):
                log = run_dir.logs / "export.log"
                await _unpack(recipe, inputs.model_path, subject.checkpoint, weights, log)
        with console.phase("start rollout server"):
            url = await server.start(subject.version, weights)
        yield url, server.token
    finally:
        await server.stop()
        shutil.rmtree(exported, ignore_errors=True)


async def _unpack(recipe: Recipe, model_path: str, checkpoint: Path, weights: Path, log: Path) -> None:
    """Export a checkpoint to a folder that a server can load.

    Runs in a child process, because this process does not import torch.

    Raises:
        RunDirError: the checkpoint does not belong to the recipe's model; the message has the end
            of the child's log.
    """
    command = [
        sys.executable, "-P", "-m", "agentloop.commands.main", "export", str(checkpoint), "--out", str(weights),
        "--dtype", recipe.model.dtype, "--model", model_path,
        *(["--trust-remote-code"] if recipe.model.trust_remote_code else []),
    ]  # fmt: skip
    with log.open("wb") as file:
        process = await spawn(
            command,
            environment=child_environment(recipe.trainer.threads),
            stdout=file,
            stderr=file,
            own_session=False,  # Ctrl-C ends the export too
        )
        try:
            async with asyncio.timeout(recipe.trainer.timeout_s):
                code = await process.wait()
        except TimeoutError:
            raise WorkerError(
                f"the export of {checkpoint} (process {process.pid}) did not end in {recipe.trainer.timeout_s:.0f} s",
                f"see {log}; raise trainer.timeout_s if the model is large",
            ) from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    if code:
        raise RunDirError(f"{checkpoint} cannot be served:\n{log_tail(log)}", "check --checkpoint and model.path")


def _print(metrics: dict[str, Any]) -> None:
    """Print the table, without colour or wrapping when the output is not a terminal."""
    rich = RichConsole(highlight=False, markup=False)
    if not rich.is_terminal:
        rich.width = PLAIN_COLUMNS
    rich.print(table(metrics))


def table(metrics: dict[str, Any]) -> Table:
    """Return the results as a table: one line for all rows, and one per data source."""
    own = [key.removeprefix("eval/") for key in metrics if key.startswith("eval/")]
    sources = [key.removesuffix("/reward_mean") for key in own if key.endswith("/reward_mean")]
    prefixes = [f"{source}/" for source in sources]
    middle = [key for key in own if ("@" in key or key == "reward_mean") and not key.startswith(tuple(prefixes))]
    columns = [*COUNTS, *middle, *ENDS]
    if not metrics.get("eval/tool_errors_mean"):
        columns.remove("tool_errors_mean")
    shown = Table(box=box.SIMPLE_HEAD, title=f"evaluation of version {metrics['version']}", title_justify="left")
    shown.add_column("rows", no_wrap=True)
    for column in columns:
        shown.add_column(HEADS.get(column, column), justify="right", no_wrap=True)
    for label, prefix in [("all", ""), *zip(sources, prefixes, strict=True)]:
        values = (finite(metrics.get(f"eval/{prefix}{column}")) for column in columns)
        shown.add_row(label, *(number(value) for value in values))
    return shown
