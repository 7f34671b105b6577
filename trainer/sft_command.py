"""The body of `agentloop sft`: configuration, data preparation, stages, and what is said on the way."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agentloop.config import SftRecipe
from agentloop.config_load import load_config
from agentloop.errors import AgentloopError, ConfigError
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
    except AgentloopError:
        print(f"continue with: {resume_line}", file=sys.stderr)
        raise
    _say(f"done in {time.monotonic() - begin:.0f} s: {out}")
    return 0


def _prepare(target: str, folder: Path) -> None:
    """Call `path.py:function` with the folder that holds the stages' data."""
    _say(f"prepare data in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    _load_function(target)(folder)


def _load_function(target: str) -> Callable[[Path], Any]:
    """Import a function by file and name.

    Raises:
        ConfigError: there is no such file or function.
    """
    path, _, name = target.partition(":")
    hint = "write prepare: ./data.py:function, relative to the recipe's folder"
    if not name or not Path(path).is_file():
        raise ConfigError(f"prepare: {target!r} names no function in a file", hint)
    spec = importlib.util.spec_from_file_location(f"agentloop_prepare_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look the module up
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"prepare: {path} has no function {name!r}", hint)
    return function


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
