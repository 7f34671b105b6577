"""What a logger is given, and what it has to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from agentloop.files import write_atomic


@dataclass(frozen=True)
class LoggerRun:
    """What a logger is told of the run.

    Attributes:
        name: `run.name`.
        config: the resolved recipe as plain data, tokens hidden.
        folder: the logger's own, in the run directory; it exists, and is kept when the run is resumed.
        resumed_at: the step that a resumed run goes on from: what was logged of later steps is logged again. -1: it
            begins anew. None: a new run.
    """

    name: str
    config: dict[str, Any]
    folder: Path
    resumed_at: int | None = None

    def remember(self, **state: str) -> None:
        """Keep something for the time after a resume, the id of the run at a service for instance."""
        write_atomic(self.folder / "state.json", json.dumps({**self.remembered, **state}).encode())

    @property
    def remembered(self) -> dict[str, str]:
        """What `remember` kept, in this process or in one before it."""
        file = self.folder / "state.json"
        return dict(json.loads(file.read_text())) if file.is_file() else {}


class MetricLogger(Protocol):
    """A place that metrics are written to. Made as `Logger(run, **options)`; all its calls come from one thread.

    A class may have the attribute `library`: the module that it needs, which preflight looks for.
    """

    library: ClassVar[str]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step's numbers. A step may come more than once, with other numbers: a background evaluation's."""
        ...

    def close(self, *, failed: bool) -> None:
        """Write what is not written yet, and say how the run ended."""
        ...


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
