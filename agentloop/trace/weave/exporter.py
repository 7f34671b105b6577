"""`WeaveExporter`: the destination that `trace.weave` of a recipe names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from agentloop.config import WeaveConfig
from agentloop.errors import ConfigError
from agentloop.trace.exporting import ExportRun, TracedEpisode
from agentloop.trace.weave.bounds import bound
from agentloop.trace.weave.calls import EpisodeCall, calls_of
from agentloop.trace.weave.client import Client
from agentloop.trace.weave.connections import check_variables, shown
from agentloop.trace.weave.images import Images
from agentloop.trace.weave.keys import WANDB, check_key


class WeaveExporter:
    """See `SpanExporter`. Ids of calls follow from the episode's: sent again, a call stays one.

    Raises:
        ConfigError: the project is not `project` or `entity/project`, a variable with an address
            of weave has none, or the key is missing.
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
        check_variables()
        check_key()
        address = os.environ.get("WF_TRACE_SERVER_URL") or os.environ.get("WANDB_BASE_URL") or WANDB
        self.destination = f"{shown(address)} {self._entity or ''}/{project}"

    def export(self, episodes: Sequence[TracedEpisode]) -> None:
        """Send episodes as trees of calls. The first call connects, which imports weave for 1 s.

        Raises:
            ConfigError: the key is missing.
            ExportError: the server did not take all of them.
        """
        if self._client is None:
            self._client = Client(self._entity, self._project, _model(self._run.model))
        self._client.send([calls for episode in episodes if (calls := self._calls(episode))])

    def close(self, timeout_s: float) -> None:
        self._client = None

    def _calls(self, episode: TracedEpisode) -> list[EpisodeCall]:
        calls = calls_of(episode, texts=self._texts, image=self._images.image)
        for call in calls:
            bound(call, f"all of it is in {self._run.folder}, episode {episode.key}")
        return calls


def _model(path: str) -> str:
    """Return the name of a model: a hub id, or the last folders of a path, which tells of users."""
    return path if not Path(path).is_absolute() else "/".join(Path(path).parts[-2:])
