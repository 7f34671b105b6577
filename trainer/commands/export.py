"""The body of `agentloop export`: which checkpoint, of which model, to which folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentloop.config import CheckpointConfig
from agentloop.errors import ConfigError, RunDirError
from agentloop.model_folder import check_target
from trainer.console.console import Console
from trainer.run.rundir import CheckpointState, RunDir

LAST, BEST = "last", "best"


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint, and what its run says of the model and its adapters; empty where there is no run."""

    path: Path
    step: int
    model: dict[str, Any]
    lora_alpha: float | None = None


def export_command(
    source: Path, out: Path, *, step: str | None, dtype: str | None, model: str | None, force: bool
) -> int:
    """Run `agentloop export`; returns the exit code.

    Raises:
        UserError: what is wrong, for the user to read.
    """
    found = find_checkpoint(source, step)
    model_path = model or found.model.get("path")
    if model_path is None:
        raise RunDirError(
            f"{found.path} does not lie in a run directory, so that its model is not known",
            "name the model that the run started from with --model",
        )
    check_target(out, replace=force, source=model_path, key="--out")
    if dtype not in (None, "float32", "bfloat16"):
        raise ConfigError(f"--dtype {dtype} is not known", "one of: float32, bfloat16")
    dtype = dtype or found.model.get("dtype", "float32")
    template = found.model.get("chat_template")
    from trainer.learner.export import export_checkpoint  # torch and transformers: after what needs neither

    with Console() as console:
        console.notice(f"checkpoint of step {found.step}: {found.path}")
        exported = export_checkpoint(
            found.path / "trainer",
            model_path,
            out.absolute(),
            dtype=dtype,
            chat_template=Path(template) if template else None,
            lora_alpha=found.lora_alpha,
            on_progress=lambda done, size: console.progress(done >> 20, size >> 20, "MB written"),
        )
        console.close()
        console.notice(
            f"{exported.parameters:,} parameters in {dtype}, {exported.size / 2**20:,.1f} MB in {exported.files} "
            f"file{'s' * (exported.files > 1)}, with configuration and tokenizer: {out}"
        )
        console.notice(f"serve it with: agentloop serve --model {out}")
    return 0


def find_checkpoint(source: Path, step: str | None) -> Source:
    """The checkpoint that is meant by a run directory or by a checkpoint's own folder.

    Args:
        step: a number, `last` or `best`; None: `last`.

    Raises:
        RunDirError: there is no such run, or no such checkpoint in it; those that are there are named.
        ConfigError: `step` is none of these.
    """
    if not source.is_dir():
        raise RunDirError(
            f"{source} does not exist", "give a run directory, such as outputs/<name>, or a checkpoint in one"
        )
    if source.name == "trainer" and (source / ".metadata").is_file():
        source = source.parent
    if (source / "trainer").is_dir():
        return _one(source, step)
    run = RunDir(source.parent if source.name == "checkpoints" else source)
    if not run.config_file.is_file() and not run.checkpoints.is_dir():
        raise RunDirError(
            f"{source} is neither a run directory nor a checkpoint",
            "give a folder with config/ and checkpoints/ in it, such as outputs/<name>, or one named step_N",
        )
    states = run.list_checkpoints()
    if not states:
        raise RunDirError(
            f"{run.root} holds no finished checkpoint",
            "a run saves one after every `checkpoint.every` steps and at its end",
        )
    state = _chosen(run, states, step or LAST)
    return Source(state.path, state.step, *_read(run))


def _one(checkpoint: Path, step: str | None) -> Source:
    """A checkpoint that was named itself."""
    if step is not None:
        raise ConfigError(
            f"--step {step}: {checkpoint} is one checkpoint already", "leave out --step, or give the run directory"
        )
    if not (checkpoint / "state.json").is_file():
        raise RunDirError(f"the checkpoint {checkpoint} was never finished", "give another one")
    state = json.loads((checkpoint / "state.json").read_text())
    run = RunDir(checkpoint.resolve().parent.parent)
    return Source(checkpoint, state.get("step", 0), *_read(run))


def _chosen(run: RunDir, states: list[CheckpointState], step: str) -> CheckpointState:
    there = ", ".join(str(state.step) for state in states)
    if step == LAST:
        return states[-1]
    if step == BEST:
        return _best(run, there)
    if not step.isdecimal():
        raise ConfigError(f"--step {step} is no step", "give a number, last or best")
    state = next((state for state in states if state.step == int(step)), None)
    if state is None:
        raise RunDirError(f"{run.root} holds no checkpoint of step {step}", f"there are: {there}")
    return state


def _best(run: RunDir, there: str) -> CheckpointState:
    """The checkpoint whose step has the best value of what the run compares by; of a fine-tuning, the lowest loss."""
    config = json.loads(run.config_file.read_text()) if run.config_file.is_file() else {}
    compares = {"best_metric": "eval/loss", "best_is": "lowest"}
    if "stages" not in config:
        section = config.get("checkpoint") or {}
        compares = {key: section[key] for key in compares if key in section}
    best = run.best_checkpoints(CheckpointConfig.model_validate({"keep_best": 1, **compares}))
    if not best:
        raise RunDirError(
            f"no checkpoint of {run.root} was evaluated, so that none is known as the best (there are: {there})",
            "give a step; for another time, evaluate at the steps that are saved (eval.every and checkpoint.every)",
        )
    return best[0]


def _read(run: RunDir) -> tuple[dict[str, Any], float | None]:
    """The section `model` of the run's configuration, and alpha of its adapters, of a policy or a fine-tuning."""
    if not run.config_file.is_file():
        return {}, None
    config = json.loads(run.config_file.read_text())
    model, lora = config.get("model"), (config.get("trainer") or config).get("lora") or {}
    return model if isinstance(model, dict) else {}, lora.get("alpha")
