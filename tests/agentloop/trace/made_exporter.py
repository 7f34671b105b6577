"""A destination of spans in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from agentloop.errors import ExportError
from agentloop.trace.exporting import TracedEpisode


class MadeExporter:
    """Keeps the keys of what it gets; `down`, `refuses` and `hold` make it fail or wait."""

    destination = "here"

    def __init__(self) -> None:
        self.got: list[str] = []
        self.down = False
        self.refuses: Callable[[TracedEpisode], bool] = lambda _: False
        self.hold = threading.Event()
        self.hold.set()
        self.tried = threading.Event()
        self.closed = 0

    def export(self, episodes: Sequence[TracedEpisode]) -> None:
        self.tried.set()
        self.hold.wait(30)
        if self.down:
            raise ExportError("here cannot be reached")
        if any(self.refuses(episode) for episode in episodes):
            raise ExportError("here answered 400", final=True)
        self.got += [episode.key for episode in episodes]

    def close(self, timeout_s: float) -> None:
        self.closed += 1


def keys(*steps: int, groups: int, samples: int = 2) -> list[str]:
    """Keys of the episodes of `made_episodes.step_of`."""
    return [f"train/{s}/{s}-{g}/{n}" for s in steps for g in range(groups) for n in range(samples)]
