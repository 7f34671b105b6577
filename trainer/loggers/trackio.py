"""Logger for Trackio: metrics in a local SQLite file, with a dashboard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.loggers.base import LoggerRun


class TrackioLogger:
    """A run of a Trackio project; view it with `trackio show`.

    A resumed run keeps its name. Steps that are done again appear twice.

    Args:
        options: arguments of `trackio.init`: space_id, ...
    """

    library = "trackio"

    def __init__(self, run: LoggerRun, project: str = "agentloop", **options: Any) -> None:
        import trackio

        known = run.remembered.get("name")
        defaults = {"name": known or run.name, "resume": "must" if known else "never", "config": run.config}
        self._run = trackio.init(project=project, **{**defaults, **options})
        self.where = f"project {project}, run {self._run.name}"
        run.remember(name=str(self._run.name))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish()  # type: ignore[no-untyped-call]  # trackio has no annotations here
