"""`agentloop sft`: configuration, data preparation, the stages, and console output."""

from __future__ import annotations

import asyncio
import json
import shlex
import time
from pathlib import Path
from typing import Any

from agentloop.commands.provenance import environment
from agentloop.commands.recipes import SFT_FILE, config_words, find_config
from agentloop.config import SftRecipe
from agentloop.config.loading import load_config
from agentloop.errors import AgentloopError
from agentloop.files import disk_errors
from agentloop.imports import load_from_file
from agentloop.report import write_report
from agentloop.runtime.early import early_programs
from agentloop.text import seconds
from trainer.commands.train import EXIT_INTERRUPTED, can_continue, is_finished
from trainer.console.console import Console
from trainer.loggers import Loggers, check_loggers
from trainer.run.rundir import RunDir
from trainer.sft.run import SftRun, trainer_config
from trainer.workers.rank import early_ranks


def sft_command(config: Path, overrides: list[str], *, resume: bool, dry_run: bool = False) -> int:
    """Run `agentloop sft`; return the exit code.

    Raises:
        AgentloopError: the run cannot start, or failed.
    """
    recipe = load_config(SftRecipe, find_config(config, SFT_FILE), overrides)
    resolved = recipe.plain()
    if dry_run:
        print(json.dumps(resolved, indent=2))
        return 0

    begin = time.monotonic()
    run_dir = RunDir(recipe.run.dir or Path("outputs") / recipe.run.name)
    run_dir.check_writable()
    resume_line = shlex.join(["agentloop", "sft", *config_words(config, overrides), "--resume"])
    with Console() as console, run_dir.claimed(resume=resume, warn=console.warn):
        if not resume:
            run_dir.check_free()
        elif (recipe.out or run_dir.root / "model").is_dir() and is_finished(
            run_dir, resolved, console, "steps, epochs or a stage"
        ):
            return 0
        check_loggers(recipe.loggers)
        if recipe.prepare:
            _prepare(recipe, console)
        for change in run_dir.open(resolved, environment(), resume=resume, warn=console.warn):
            console.notice(f"changed since the run was started: {change}")
        console.notice(f"run directory {run_dir.root}")
        with early_programs(early_ranks(trainer_config(recipe))):
            out = _run(recipe, resolved, run_dir, console, resume_line, resume=resume)
        if run_dir.read_metrics():
            console.notice(f"report {write_report(run_dir.root)}")
        if out is None:
            console.interrupted(resume_line if run_dir.holds_run else resume_line.removesuffix(" --resume"))
            return EXIT_INTERRUPTED
        console.close()
        console.notice(f"done in {time.monotonic() - begin:.0f} s: the model is in {out}")
    return 0


def _run(
    recipe: SftRecipe, resolved: dict[str, Any], run_dir: RunDir, console: Console, resume_line: str, *, resume: bool
) -> Path | None:
    """Run all stages; return the folder of the finished model, or None if the run was stopped."""

    def on_log(entry: dict[str, Any]) -> None:
        _print_entry(console, entry)
        if "step" in entry:
            loggers.log(entry)

    run = SftRun(recipe, run_dir, resume=resume, on_log=on_log, on_progress=console.progress)
    loggers = Loggers(
        recipe.loggers,
        name=recipe.run.name,
        config=resolved,
        root=run_dir.root,
        resumed_at=run.done if resume else None,
        warn=console.warn,
    )
    for destination in loggers.destinations:
        console.notice(destination)
    failed = True
    try:
        with disk_errors():
            out = asyncio.run(run.run())
            if out is not None:
                run_dir.mark_finished(run.steps)
        failed = False
    except (asyncio.CancelledError, KeyboardInterrupt):  # before the first step, or a second Ctrl-C: nothing is saved
        return None
    except AgentloopError as exc:
        if can_continue(run_dir, exc, resume=resume, progressed=run.progressed):
            exc.add_note(f"continue with: {resume_line}")
        raise
    finally:
        loggers.close(failed=failed)
    return out


def _prepare(recipe: SftRecipe, console: Console) -> None:
    """Call `path.py:function` with the folder that holds the stages' data."""
    data = recipe.stages[0].data
    folder = Path(data if isinstance(data, str) else data[0]).parent
    console.notice(f"prepare data in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    load_from_file(str(recipe.prepare), "prepare")(folder)


def _print_entry(console: Console, entry: dict[str, Any]) -> None:
    """Print one line for an event, an evaluation or a step."""
    if "event" in entry:
        console.notice(entry["event"])
        return
    width = len(str(entry["steps"]))
    step = f"step {entry['step']:>{width}}/{entry['steps']}"
    if "eval/loss" in entry:
        took = seconds(entry["eval/time_s"])
        console.notice(f"{'eval':>8}  {step}  loss {entry['eval/loss']:.4f}  {entry['eval/tokens']:,} tokens  {took}")
        return
    console.notice(
        f"{entry['stage']:>8}  {step}  loss {entry['loss']:.4f}  "
        f"entropy {entry['entropy']:.3f}  grad {entry['grad_norm']:6.2f}  lr {entry['lr']:.2e}  "
        f"{entry['tokens_per_s']:>8,.0f} tokens/s  {seconds(entry['eta_s'])} left"
    )
