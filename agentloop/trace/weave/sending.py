"""What the sender process of `trace.weave` does: weave's client takes about 0.25 ms of CPU a call,
and 2 s to import."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from agentloop.trace.exporting import ExportRun, TracedEpisode
from agentloop.trace.sender.images import ReceivedImages
from agentloop.trace.weave.bounds import bound
from agentloop.trace.weave.calls import EpisodeCall, calls_of
from agentloop.trace.weave.client import Client


class WeaveSender:
    """See `agentloop.trace.sender.serving.Sender`. Connects when it is first used."""

    def __init__(self, settings: Mapping[str, Any], run: ExportRun) -> None:
        self._settings = settings
        self._run = run
        self._images = ReceivedImages()
        self._client: Client | None = None

    def send(self, episodes: Sequence[TracedEpisode], images: Mapping[str, str]) -> None:
        self._images.add(images)
        settings = self._settings
        self._client = self._client or Client(settings["entity"], settings["project"], settings["model"])
        self._client.send([calls for episode in episodes if (calls := self._calls(episode))])

    def _calls(self, episode: TracedEpisode) -> list[EpisodeCall]:
        calls = calls_of(episode, texts=self._settings["texts"], image=self._images.image)
        for call in calls:
            bound(call, f"all of it is in {self._run.folder}, episode {episode.key}")
        return calls


def sender(settings: Mapping[str, Any], run: ExportRun) -> WeaveSender:
    """Return the sender, for `serving.main`."""
    # weave reports errors within itself to its makers; a run's data is not for them.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # Each call would go through three of its threads, and nothing is sent from them.
    os.environ.setdefault("WEAVE_CLIENT_PARALLELISM", "0")
    return WeaveSender(settings, run)
