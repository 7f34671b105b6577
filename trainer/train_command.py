"""The body of `agentloop train`: configuration, checks, run, report, and what is said at the end."""

from __future__ import annotations

import asyncio
import json
import shlex
import time
from pathlib import Path

from agentloop.config import Recipe
from agentloop.config_load import load_config
from agentloop.errors import AgentloopError
from agentloop.process import run_loops
from agentloop.provenance import environment
from agentloop.report import write_report
from trainer.console import Console
from trainer.preflight import prepare
from trainer.run import RunResult, TrainRun
from trainer.rundir import RunDir
from trainer.server_process import check_port

EXIT_INTERRUPTED = 130
"""What shells expect after Ctrl-C."""


def train_command(config: Path, overrides: list[str], *, resume: bool, dry_run: bool) -> int:
    """Run `agentloop train`; returns the exit code.

    Raises:
        AgentloopError: what went wrong, for the user to read.
    """
    recipe = load_config(Recipe, config, overrides)
    resolved = json.loads(recipe.model_dump_json())
    for key in ("token", "admin_token"):
        if resolved["rollout"][key]:
            # It would be written to files and shown in the report.
            resolved["rollout"][key] = "(hidden)"
    if dry_run:
        print(json.dumps(resolved, indent=2))
        return 0
    begin = time.monotonic()
    console = Console()
    run_dir = RunDir(recipe.run_dir)
    if not resume:
        run_dir.check_free()
    prepared = prepare(recipe, console)
    check_port(recipe.rollout.host, recipe.rollout.port)
    for change in run_dir.open(resolved, environment(), resume=resume):
        console.notice(f"changed since the run was started: {change}")
    console.notice(f"run directory {run_dir.root}")
    resume_line = shlex.join(["agentloop", "train", "--config", str(config), *overrides, "--resume"])
    try:
        result = run_loops(TrainRun(recipe, prepared, run_dir, console, resume=resume).run())
    except asyncio.CancelledError:  # Ctrl-C before the first step: nothing to save
        console.interrupted(resume_line if run_dir.holds_run else resume_line.removesuffix(" --resume"))
        return EXIT_INTERRUPTED
    except AgentloopError as exc:
        console.close()
        if run_dir.read_metrics():
            write_report(run_dir.root)
            exc.add_note(f"continue with: {resume_line}")
        raise
    return _finish(result, run_dir, console, resume_line, time.monotonic() - begin)


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
