"""The body of `agentloop sft`: configuration, data preparation, stages, and what is said on the way."""

from __future__ import annotations

import asyncio
import json
import shlex
import time
from pathlib import Path
from typing import Any

from agentloop.config import SftRecipe
from agentloop.config_load import load_config
from agentloop.errors import AgentloopError
from agentloop.imports import load_from_file
from agentloop.provenance import environment
from trainer.rundir import RunDir
from trainer.sft import run_sft

EXIT_INTERRUPTED = 130
"""What shells expect after Ctrl-C."""


def sft_command(config: Path, overrides: list[str], *, resume: bool, dry_run: bool = False) -> int:
    """Run `agentloop sft`; returns the exit code.

    Raises:
        AgentloopError: what went wrong, for the user to read.
    """
    recipe = load_config(SftRecipe, config, overrides)
    resolved = json.loads(recipe.model_dump_json())
    if dry_run:
        print(json.dumps(resolved, indent=2))
        return 0
    begin = time.monotonic()
    run_dir = RunDir(recipe.run.dir or Path("outputs") / recipe.run.name)
    if not resume:
        run_dir.check_free()
    if recipe.prepare:
        _prepare(recipe.prepare, Path(recipe.stages[0].data).parent)
    for change in run_dir.open(resolved, environment(), resume=resume):
        _say(f"changed since the run was started: {change}")
    _say(f"run directory {run_dir.root}")
    resume_line = shlex.join(["agentloop", "sft", "--config", str(config), *overrides, "--resume"])
    try:
        out = asyncio.run(run_sft(recipe, run_dir, resume=resume, on_log=_print))
    except KeyboardInterrupt:
        _say(f"stopped; continue with: {resume_line}")
        return EXIT_INTERRUPTED
    except AgentloopError as exc:
        exc.add_note(f"continue with: {resume_line}")
        raise
    _say(f"done in {time.monotonic() - begin:.0f} s: {out}")
    return 0


def _prepare(target: str, folder: Path) -> None:
    """Call `path.py:function` with the folder that holds the stages' data."""
    _say(f"prepare data in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    load_from_file(target, "prepare")(folder)


def _print(entry: dict[str, Any]) -> None:
    if "event" in entry:
        _say(entry["event"])
        return
    width = len(str(entry["steps"]))
    _say(
        f"{entry['stage']:>8}  step {entry['step']:>{width}}/{entry['steps']}  loss {entry['loss']:.4f}  "
        f"entropy {entry['entropy']:.3f}  grad {entry['grad_norm']:6.2f}  lr {entry['lr']:.2e}  "
        f"{entry['tokens_per_s']:>8,.0f} tokens/s"
    )


def _say(line: str) -> None:
    print(line, flush=True)
