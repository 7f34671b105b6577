"""`agentloop train`: configuration, checks, the run, its report and summary."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentloop.commands.provenance import environment
from agentloop.commands.recipes import config_words, find_config
from agentloop.config import Recipe
from agentloop.config.loading import load_config
from agentloop.errors import AgentloopError, DiskError
from agentloop.files import disk_errors
from agentloop.report import write_report
from agentloop.runtime.early import EarlyProgram, early_programs
from agentloop.runtime.event_loop import run_loops, uncollected
from agentloop.trace.exporting import ExportRun, load_destinations, sampled_text
from agentloop.trace.sender import SpanSender
from trainer.cluster.session import check_ray
from trainer.console.console import Console
from trainer.loggers import Loggers, check_loggers
from trainer.publishing.server_process import check_port, early_server
from trainer.run.rundir import RunDir
from trainer.workers.rank import RankLost, early_ranks

if TYPE_CHECKING:
    from trainer.run.run import RunResult

EXIT_INTERRUPTED = 130
"""Exit code that shells expect after Ctrl-C."""


def train_command(config: Path, overrides: list[str], *, resume: bool, dry_run: bool) -> int:
    """Run `agentloop train`; return the exit code.

    Raises:
        AgentloopError: the run cannot start, or failed.
    """
    recipe = load_config(Recipe, find_config(config), overrides)
    resolved = recipe.plain()
    if dry_run:
        print(json.dumps(resolved, indent=2))
        return 0

    console = Console()
    run_dir = RunDir(recipe.run_dir)
    run_dir.check_writable()
    resume_line = shlex.join(["agentloop", "train", *config_words(config, overrides), "--resume"])
    with run_dir.claimed(resume=resume, warn=console.warn):
        if not resume:
            run_dir.check_free()
        elif not recipe.eval.only and is_finished(run_dir, resolved, console, "run.steps=<steps>"):
            return 0
        check_ray(recipe)
        check_loggers(recipe.loggers)
        load_destinations(recipe.trace, ExportRun.of(recipe, run_dir.root))  # refused here, before anything starts
        try:
            with early_programs(_programs(recipe)):
                return _train_on(recipe, resolved, run_dir, console, resume_line, resume=resume)
        except KeyboardInterrupt:  # while the recipe is checked: the run itself handles the signal
            console.interrupted(resume_line if run_dir.holds_run else resume_line.removesuffix(" --resume"))
            return EXIT_INTERRUPTED


def _programs(recipe: Recipe) -> list[EarlyProgram]:
    """Return the programs of the run: they import torch while the recipe is checked."""
    if recipe.cluster.kind != "local":
        return []
    ranks = early_ranks(recipe.trainer)
    # The server first: it has more to import.
    return ranks if recipe.rollout.url is not None else [early_server(recipe.rollout), *ranks]


def is_finished(run_dir: RunDir, resolved: dict[str, Any], console: Console, longer: str) -> bool:
    """Return whether nothing is left to do in a run that is resumed unchanged, and say so.

    Args:
        longer: the override that continues the run.
    """
    steps = run_dir.finished_steps()
    if steps is None or run_dir.read_config() != resolved:
        return False
    _say_finished(run_dir, steps, console, longer)
    return True


def _say_finished(run_dir: RunDir, steps: int, console: Console, longer: str) -> None:
    console.notice(f"{run_dir.root} is finished: {steps} of {steps} steps. To train on, add {longer}")


class _GoesOn(Exception):
    """The run lost a rank, and can go on from its last checkpoint.

    Attributes:
        recipe: with the numbers of processes that the run had last.
    """

    def __init__(self, reason: str, recipe: Recipe) -> None:
        super().__init__(reason)
        self.recipe = recipe


def _train_on(
    recipe: Recipe, resolved: dict[str, Any], run_dir: RunDir, console: Console, resume_line: str, *, resume: bool
) -> int:
    """Train; when a rank is lost, go on from the last checkpoint, as `--resume` does."""
    begin, most = time.monotonic(), recipe.trainer.max_restarts
    for restarts in itertools.count():
        left = most - restarts
        try:
            return _train(
                recipe,
                resolved,
                run_dir,
                console,
                resume_line,
                resume=resume,
                begin=begin,
                restarts=restarts,
                left=left,
            )
        except _GoesOn as exc:
            newest = next(iter(reversed(run_dir.list_checkpoints())), None)
            place = f"the checkpoint of step {newest.step}" if newest is not None else "the beginning"
            console.warn(f"{exc}\nthe run goes on by itself from {place} ({restarts + 1} of {most})")
            recipe, resume = exc.recipe, True
        except AgentloopError as exc:
            if restarts and not getattr(exc, "__notes__", ()):  # the user did not give --resume, and it may help
                exc.add_note(f"continue with: {resume_line}")
            raise
    raise AssertionError  # the loop does not end


def _train(
    recipe: Recipe,
    resolved: dict[str, Any],
    run_dir: RunDir,
    console: Console,
    resume_line: str,
    *,
    resume: bool,
    begin: float,
    restarts: int,
    left: int,
) -> int:
    """Prepare and run in a claimed run directory; return the exit code.

    Args:
        begin: when the command began, on the monotonic clock.
        restarts: how often this command has gone on after a lost rank.
        left: how often it may do so again.

    Raises:
        _GoesOn: a rank was lost, and the run has trained a step since it began.
    """
    with uncollected():  # here, while the early programs import as well
        from trainer.run.preflight import prepare
        from trainer.run.run import TrainRun

    inputs = prepare(recipe, console)
    if resume and not recipe.eval.only and (run_dir.finished_steps() or 0) >= inputs.total_steps:
        _say_finished(run_dir, inputs.total_steps, console, "run.steps=<steps>")
        return 0
    check_port(recipe.rollout.host, recipe.rollout.port)
    with console.phase("verify checkpoint") if resume else contextlib.nullcontext():
        changes = run_dir.open(resolved, environment(), resume=resume, warn=console.warn)
    for change in changes:
        console.notice(f"changed since the run was started: {change}")
    console.notice(f"run directory {run_dir.root}")
    loggers = _open_loggers(recipe, resolved, run_dir, console, resume=resume)
    for destination in loggers.destinations:
        console.notice(destination)
    sender = open_sender(recipe, run_dir, console)
    run = TrainRun(recipe, inputs, run_dir, console, resume=resume, loggers=loggers, sender=sender)
    failed = True
    try:
        with disk_errors():
            result = run_loops(run.run())
        failed = False
    except asyncio.CancelledError:  # Ctrl-C before the first step: nothing to save
        failed = False
        console.interrupted(resume_line if run_dir.holds_run else resume_line.removesuffix(" --resume"))
        return EXIT_INTERRUPTED
    except AgentloopError as exc:
        progressed = run.progressed or restarts > 0
        if isinstance(exc, RankLost) and left > 0 and progressed and not run.stopping:
            raise _GoesOn(exc.message, run.as_scaled(recipe)) from exc
        console.close()
        if run_dir.read_metrics():
            with contextlib.suppress(AgentloopError):  # a full disk must not hide the first error
                write_report(run_dir.root)
        if can_continue(run_dir, exc, resume=resume, progressed=progressed):
            exc.add_note(f"continue with: {resume_line}")
        raise
    finally:
        loggers.close(failed=failed)
        sender.close()
    if not result.interrupted and not recipe.eval.only:
        run_dir.mark_finished(result.steps)
    return _finish(result, run_dir, console, resume_line, time.monotonic() - begin)


def can_continue(run_dir: RunDir, exc: AgentloopError, *, resume: bool, progressed: bool) -> bool:
    """Return whether `--resume` is the way on after an error.

    It is not if it was given and failed before a step was trained, unless a full disk is to blame.
    """
    return run_dir.holds_run and (not resume or progressed or isinstance(exc, DiskError))


def _open_loggers(
    recipe: Recipe, resolved: dict[str, Any], run_dir: RunDir, console: Console, *, resume: bool
) -> Loggers:
    """Open the recipe's loggers; a resumed run continues its earlier logs."""
    options: dict[str, Any] = {
        "name": recipe.run.name,
        "config": resolved,
        "root": run_dir.root,
        "resumed_at": (run_dir.resume_point.step if run_dir.resume_point else -1) if resume else None,
        "warn": console.warn,
    }
    if not recipe.loggers:
        return Loggers([], **options)
    with console.phase("open loggers " + ", ".join(logger.name for logger in recipe.loggers)):
        return Loggers(recipe.loggers, **options)


def open_sender(recipe: Recipe, run_dir: RunDir, console: Console) -> SpanSender:
    """Start what sends spans to the destinations that a recipe names."""
    run = ExportRun.of(recipe, run_dir.root)
    destinations = load_destinations(recipe.trace, run)
    for destination in destinations:
        sampled = sampled_text(destination.sampling)
        console.notice(f"spans go to {destination.name}: {destination.exporter.destination}{sampled}")
    return SpanSender(destinations, recipe.trace, run, warn=console.warn)


def _finish(result: RunResult, run_dir: RunDir, console: Console, resume_line: str, seconds: float) -> int:
    report = None
    if run_dir.read_metrics():
        with console.phase("write report"):
            report = write_report(run_dir.root)
    if result.interrupted:
        console.interrupted(resume_line)
        console.close()
        return EXIT_INTERRUPTED
    console.summary(
        run_dir=run_dir.root,
        report=report,
        first_reward=result.first_reward,
        last_reward=result.last_reward,
        eval_first=result.eval_first,
        eval_last=result.eval_last,
        seconds=seconds,
    )
    console.close()
    return 0
