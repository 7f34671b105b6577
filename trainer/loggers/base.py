"""The interface of a metric logger, and the facts about the run that it gets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from agentloop.files import write_atomic


@dataclass(frozen=True)
class LoggerRun:
    """The run that a logger writes for.

    Attributes:
        name: `run.name`.
        config: the resolved recipe as plain data, without secrets.
        folder: the logger's folder in the run directory. It exists, and survives a resume.
        resumed_at: the step that a resumed run continues from; later steps are logged again. -1 if
            the run starts over, None for a new run.
    """

    name: str
    config: dict[str, Any]
    folder: Path
    resumed_at: int | None = None

    def remember(self, **state: str) -> None:
        """Keep values across a resume, for example the run's id at a service."""
        write_atomic(self.folder / "state.json", json.dumps({**self.remembered, **state}).encode())

    @property
    def remembered(self) -> dict[str, str]:
        """The values that `remember` kept, in this process or an earlier one."""
        file = self.folder / "state.json"
        return dict(json.loads(file.read_text())) if file.is_file() else {}


class MetricLogger(Protocol):
    """A destination of metrics: `Logger(run, **options)`. All calls come from one thread.

    Attributes:
        library: optional; the module that the logger needs, checked before the run starts.
        where: optional; the folder or address where the metrics can be seen, printed at the start.
    """

    library: ClassVar[str]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a step's metrics. A background evaluation may add keys to an earlier step."""
        ...

    def close(self, *, failed: bool) -> None:
        """Write what is pending, and record how the run ended."""
        ...


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested mapping to dotted keys."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
