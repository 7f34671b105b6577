"""Logger for Weights & Biases."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from trainer.loggers.base import LoggerRun


class WandbLogger:
    """A run at Weights & Biases. `mode: offline` writes to `<run>/loggers/wandb` for `wandb sync`.

    A resumed run keeps its id. Steps that are done again appear twice, because wandb cannot remove
    a point. `step` is the x axis of all charts, because wandb's own counter cannot decrease.

    Args:
        options: arguments of `wandb.init`: entity, group, tags, mode, ...
    """

    library = "wandb"

    def __init__(self, run: LoggerRun, project: str = "agentloop", **options: Any) -> None:
        import wandb

        known = run.remembered.get("id")
        defaults = {
            "name": run.name,
            "id": known or secrets.token_hex(5),
            "resume": "allow",
            "dir": str(run.folder),
            "config": run.config,
            # wandb's console capture would interfere with the progress bar.
            "settings": wandb.Settings(console="off"),
        }
        self._run = wandb.init(project=project, **{**defaults, **options})
        self.where = str(self._run.url or run.folder)
        run.remember(id=str(self._run.id))

        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, "step": step})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)
