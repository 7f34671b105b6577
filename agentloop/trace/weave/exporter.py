"""`WeaveExporter`: the destination that `trace.weave` of a recipe names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import ClassVar

from agentloop.config import WeaveConfig
from agentloop.errors import ConfigError, ExportError
from agentloop.text import hide_secrets
from agentloop.trace.exporting import ExportRun, TracedEpisode
from agentloop.trace.weave.bounds import bound
from agentloop.trace.weave.calls import calls_of
from agentloop.trace.weave.client import Client
from agentloop.trace.weave.images import Images

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
        self._entity = entity or config.entity or os.environ.get("WANDB_ENTITY") or None
        self._project = project
        self._texts = config.token2text
        self._run = run
        self._images = Images()
        self._client: Client | None = None
        self._closed = False
        address = os.environ.get("WF_TRACE_SERVER_URL") or os.environ.get("WANDB_BASE_URL") or WANDB
        self.destination = f"{hide_secrets(address.rstrip('/'))} {self._entity or ''}/{project}"

    def export(self, episodes: Sequence[TracedEpisode]) -> None:
        """Send episodes as trees of calls.

        Raises:
            ExportError: the server did not take all of them.
        """
        if self._closed:
            raise ExportError("weave: the exporter is closed")
        if self._client is None:
            # weave reports errors within itself to its makers; a run's data is not for them.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            self._client = Client(self._entity, self._project, self._run.model)
        trees = []
        for episode in episodes:
            calls = calls_of(episode, texts=self._texts, image=self._images.open)
            for call in calls:
                bound(call, f"all of it is in {self._run.folder}, episode {episode.key}")
            if calls:
                trees.append(calls)
        self._client.send(trees)

    def close(self, timeout_s: float) -> None:
        self._closed = True
        if self._client is not None:
            self._client.close()
