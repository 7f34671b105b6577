"""`WeaveExporter`: the destination that `trace.weave` of a recipe names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from agentloop.config import WeaveConfig
from agentloop.errors import ConfigError
from agentloop.text import hide_secrets
from agentloop.trace.exporting import ExportRun, TracedEpisode
from agentloop.trace.sender import SenderProcess

MODULE = "agentloop.trace.weave.sending"

WANDB = "https://api.wandb.ai"


class WeaveExporter:
    """See `SpanExporter`. Ids of calls follow from the episode's: sent again, a call stays one.

    Raises:
        ConfigError: the project is not `project` or `entity/project`.
    """

    library: ClassVar[str] = "weave"
    extra: ClassVar[str] = "weave"

    def __init__(self, config: WeaveConfig, run: ExportRun) -> None:
        entity, _, project = config.project.rpartition("/")
        if "/" in entity or not project or (entity and config.entity not in (None, entity)):
            raise ConfigError(
                f"trace.weave.project is {config.project!r}, which is not the name of a project",
                "give `project` or `entity/project`, and trace.weave.entity at most once",
            )
        selected = entity or config.entity or os.environ.get("WANDB_ENTITY") or None
        settings = {"entity": selected, "project": project, "model": _model(run.model), "texts": config.token2text}
        self._process = SenderProcess("weave", MODULE, settings, run, images=True)
        address = os.environ.get("WF_TRACE_SERVER_URL") or os.environ.get("WANDB_BASE_URL") or WANDB
        self.destination = f"{hide_secrets(address.rstrip('/'))} {selected or ''}/{project}"

    def export(self, episodes: Sequence[TracedEpisode]) -> None:
        """Send episodes as trees of calls.

        Raises:
            ExportError: the server did not take all of them.
        """
        self._process.send(episodes)

    def finish(self) -> None:
        self._process.finish()

    def close(self, timeout_s: float) -> None:
        self._process.close()


def _model(path: str) -> str:
    """Return the name of a model: a hub id, or the last folders of a path, which tells of users."""
    return path if not Path(path).is_absolute() else "/".join(Path(path).parts[-2:])
