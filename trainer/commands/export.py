"""`agentloop export`: find the checkpoint and its model, then write the folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentloop.commands.runs import found_runs
from agentloop.config import CheckpointConfig
from agentloop.errors import ConfigError, RunDirError
from agentloop.model_folder import ModelFolder, check_target, code_warning
from trainer.checkpoint_files import BrokenCheckpoint, read_state, verify
from trainer.console.console import Console
from trainer.run.rundir import CheckpointState, RunDir

LAST, BEST = "last", "best"


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint, and the model and LoRA alpha of its run (empty without a run directory)."""

    path: Path
    step: int
    model: dict[str, Any]
    lora_alpha: float | None = None


def export_command(
    source: Path,
    out: Path,
    *,
    step: str | None,
    dtype: str | None,
    model: str | None,
    force: bool,
    trust_remote_code: bool = False,
) -> int:
    """Run `agentloop export`; return the exit code.

    Raises:
        UserError: there is no such checkpoint, or the target cannot be used.
    """
    found = find_checkpoint(source, step)
    model_path = model or found.model.get("path")
    if model_path is None:
        raise RunDirError(
            f"{found.path} is not in a run directory, so its model is unknown",
            "give the model that the run started from with --model",
        )
    check_target(out, replace=force, source=model_path, key="--out")
    if dtype not in (None, "float32", "bfloat16"):
        raise ConfigError(f"unknown --dtype {dtype}", "use float32 or bfloat16")
    dtype = dtype or found.model.get("dtype", "float32")
    template = found.model.get("chat_template")

    # Imports torch and transformers, so do it after the checks that need neither.
    from trainer.learner.export import export_checkpoint

    trust = trust_remote_code or found.model.get("trust_remote_code") is True
    with Console() as console:
        if warning := code_warning(ModelFolder(Path(model_path)), trust_remote_code=trust):
            console.warn(warning)
        console.notice(f"checkpoint of step {found.step}: {found.path}")
        exported = export_checkpoint(
            found.path / "trainer",
            model_path,
            out.absolute(),
            dtype=dtype,
            chat_template=Path(template) if template else None,
            lora_alpha=found.lora_alpha,
            trust_remote_code=trust,
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
    """Find a checkpoint in a run directory, or by its own folder.

    Args:
        step: a number, `last` or `best`; None: `last`.

    Raises:
        RunDirError: the run or the checkpoint does not exist, or the checkpoint is damaged; the
            message lists the existing ones.
        ConfigError: `step` is not a number, `last` or `best`.
    """
    if not source.is_dir():
        raise RunDirError(
            f"{source} does not exist",
            found_runs("give a run directory, or a checkpoint in one (of a recipe: run.name)", beside=source),
        )
    if source.name == "trainer" and (source / ".metadata").is_file():
        source = source.parent
    if (source / "trainer").is_dir():
        return _one(source, step)
    run = RunDir(source.parent if source.name == "checkpoints" else source)
    if not run.config_file.is_file() and not run.checkpoints.is_dir():
        raise RunDirError(
            f"{source} is neither a run directory nor a checkpoint",
            found_runs("give a folder with config/ and checkpoints/ in it, or one named step_N", beside=source),
        )
    folders = run.checkpoint_folders()
    if not folders:
        raise RunDirError(
            f"{run.root} has no finished checkpoint",
            "a run saves one every `checkpoint.every` steps and at its end",
        )
    chosen = folders[-1] if step in (None, LAST) else _chosen(run, run.list_checkpoints(), str(step)).path
    try:
        verify(chosen)
    except BrokenCheckpoint as exc:
        others = ", ".join(folder.name.removeprefix("step_") for folder in folders if folder != chosen) or "none"
        raise BrokenCheckpoint(exc.folder, exc.fault, f"choose another step: {others}") from None
    return Source(chosen, read_state(chosen)["step"], *_read(run))


def _one(checkpoint: Path, step: str | None) -> Source:
    """Return the checkpoint in the folder `checkpoint`."""
    if step is not None:
        raise ConfigError(
            f"--step {step}: {checkpoint} is already a single checkpoint", "omit --step, or give the run directory"
        )
    try:
        verify(checkpoint)
    except BrokenCheckpoint as exc:
        raise BrokenCheckpoint(exc.folder, exc.fault, "give another one") from None
    run = RunDir(checkpoint.resolve().parent.parent)
    return Source(checkpoint, read_state(checkpoint)["step"], *_read(run))


def _chosen(run: RunDir, states: list[CheckpointState], step: str) -> CheckpointState:
    existing = ", ".join(str(state.step) for state in states)
    if step == BEST:
        return _best(run, existing)
    if not step.isdecimal():
        raise ConfigError(f"--step {step} is not a step", "give a number, last or best")
    state = next((state for state in states if state.step == int(step)), None)
    if state is None:
        raise RunDirError(f"{run.root} has no checkpoint of step {step}", f"existing checkpoints: {existing}")
    return state


def _best(run: RunDir, existing: str) -> CheckpointState:
    """Return the checkpoint with the run's best metric; for fine-tuning, the lowest loss."""
    config = run.read_config() or {}
    compares = {"best_metric": "eval/loss", "best_is": "lowest"}
    if "stages" not in config:
        section = config.get("checkpoint") or {}
        compares = {key: section[key] for key in compares if key in section}
    best = run.best_checkpoints(CheckpointConfig.model_validate({"keep_best": 1, **compares}))
    if not best:
        raise RunDirError(
            f"no checkpoint of {run.root} was evaluated, so the best one is unknown (existing: {existing})",
            "give a step; in future runs, let eval.every and checkpoint.every fall on the same steps",
        )
    return best[0]


def _read(run: RunDir) -> tuple[dict[str, Any], float | None]:
    """Return section `model` and the LoRA alpha of a training or fine-tuning run."""
    config = run.read_config() or {}
    model, lora = config.get("model"), (config.get("trainer") or config).get("lora") or {}
    return model if isinstance(model, dict) else {}, lora.get("alpha")
