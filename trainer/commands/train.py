"""`agentloop train`: configuration, checks, the run, its report and summary."""

from __future__ import annotations

import asyncio
import json
import shlex
import time
from pathlib import Path
from typing import Any

from agentloop.commands.provenance import environment
from agentloop.commands.recipes import config_words, find_config
from agentloop.config import Recipe
from agentloop.config.loading import load_config
from agentloop.errors import AgentloopError
from agentloop.report import write_report
from agentloop.runtime.event_loop import run_loops
from trainer.console.console import Console
from trainer.loggers import Loggers, check_loggers
from trainer.publishing.server_process import check_port
from trainer.run.preflight import prepare
from trainer.run.run import RunResult, TrainRun
from trainer.run.rundir import RunDir

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

    begin = time.monotonic()
    console = Console()
    run_dir = RunDir(recipe.run_dir)
    run_dir.check_writable()
    if not resume:
        run_dir.check_free()
    check_loggers(recipe.loggers)
    inputs = prepare(recipe, console)
    check_port(recipe.rollout.host, recipe.rollout.port)
    for change in run_dir.open(resolved, environment(), resume=resume):
        console.notice(f"changed since the run was started: {change}")
    console.notice(f"run directory {run_dir.root}")
    resume_line = shlex.join(["agentloop", "train", *config_words(config, overrides), "--resume"])
    loggers = _open_loggers(recipe, resolved, run_dir, console, resume=resume)
    failed = True
    try:
        result = run_loops(TrainRun(recipe, inputs, run_dir, console, resume=resume, loggers=loggers).run())
        failed = False
    except asyncio.CancelledError:  # Ctrl-C before the first step: nothing to save
        failed = False
        console.interrupted(resume_line if run_dir.holds_run else resume_line.removesuffix(" --resume"))
        return EXIT_INTERRUPTED
    except AgentloopError as exc:
        console.close()
        if run_dir.read_metrics():
            write_report(run_dir.root)
            exc.add_note(f"continue with: {resume_line}")
        raise
    finally:
        loggers.close(failed=failed)
    return _finish(result, run_dir, console, resume_line, time.monotonic() - begin)


def _open_loggers(
    recipe: Recipe, resolved: dict[str, Any], run_dir: RunDir, console: Console, *, resume: bool
) -> Loggers:
    """Open the recipe's loggers; a resumed run continues its earlier logs."""
    checkpoints = run_dir.list_checkpoints() if resume else []
    options: dict[str, Any] = {
        "name": recipe.run.name,
        "config": resolved,
        "root": run_dir.root,
        "resumed_at": (checkpoints[-1].step if checkpoints else -1) if resume else None,
        "warn": console.warn,
    }
    if not recipe.loggers:
        return Loggers([], **options)
    with console.phase("open loggers " + ", ".join(logger.name for logger in recipe.loggers)):
        return Loggers(recipe.loggers, **options)


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
