"""Find the adapters of another run that a run trains further: `trainer.lora.adapters`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agentloop.config import LoraConfig
from agentloop.errors import RunDirError
from agentloop.files import real_path
from trainer.checkpoint_files import TENSORS, verify
from trainer.run.rundir import RunDir


def find_adapters(lora: LoraConfig | None, model_path: str) -> Path | None:
    """Return the checkpoint whose adapters a run starts from; None: it starts with new ones.

    Args:
        lora: adapters of the run that starts.
        model_path: the local folder of its model.

    Raises:
        RunDirError: there is no checkpoint; it is damaged; or its run trained no adapters, others
            than `lora` describes, or on another model.
    """
    if lora is None or lora.adapters is None:
        return None
    given = real_path(lora.adapters)
    alone = (given / TENSORS).is_dir()
    run = RunDir(given.parent.parent if alone else given)
    folders = [given] if alone else run.checkpoint_folders()
    if not folders:
        raise RunDirError(
            f"trainer.lora.adapters: {given} has no checkpoint",
            "name a run directory with a finished checkpoint, such as outputs/<name>, or a folder "
            "checkpoints/step_N in one",
        )
    verify(folders[-1])
    _check_config(run, lora, model_path)
    return folders[-1]


def _check_config(run: RunDir, lora: LoraConfig, model_path: str) -> None:
    """Refuse adapters of another shape or scale, or of another model.

    The shapes alone would not show it: alpha is not in a checkpoint, and two models of one
    architecture have the same shapes.
    """
    config = run.read_config() or {}
    trained: dict[str, Any] = (config.get("trainer") or config).get("lora") or {}
    if not trained:
        raise RunDirError(
            f"trainer.lora.adapters: the run {run.root} trained no adapters",
            f"start from its finished model instead: agentloop export {run.root} --out <folder>, model.path=<folder>",
        )

    for key, wanted in lora.plain().items():
        if key != "adapters" and trained.get(key) != wanted:
            raise RunDirError(
                f"trainer.lora.adapters: trainer.lora.{key} is {wanted}, and the adapters of {run.root} were trained "
                f"with {trained.get(key)}",
                f"set trainer.lora.{key}={trained.get(key)}; or merge them, and train new ones on the merged model: "
                f"agentloop export {run.root} --out <folder>, model.path=<folder>",
            )

    base = (config.get("model") or {}).get("path")
    # A hub id has been resolved to a folder of the cache by now: only folders are compared.
    if base is not None and Path(base).is_dir() and real_path(Path(base)) != real_path(Path(model_path)):
        raise RunDirError(
            f"trainer.lora.adapters: the adapters of {run.root} belong to model.path={base}, and this run's model is "
            f"{model_path}",
            f"set model.path={base}",
        )
