"""`Shared`: the parts of an episode that all of its branches use."""

from __future__ import annotations

from dataclasses import dataclass, field

from agentloop.chat import ChatRenderer
from agentloop.client.client import Generator
from agentloop.config import AgentConfig, SamplingConfig
from agentloop.episode.budget import Budget
from agentloop.episode.images import ImageLoader
from agentloop.interaction.session import InteractionSession
from agentloop.runtime.pacing import Pacer
from agentloop.tool.session import ToolSession
from agentloop.trace.spans import Recorder
from agentloop.types import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """Fixed for the whole episode. Changing state is in a `Branch`, or in objects shared by forks.

    Attributes:
        session: the episode's open tools.
        interaction: the row's simulated user or environment; None: the row has none.
        images: decodes the images of messages, for all episodes of the run.
        budget: what the episode may use and has used, forks included.
        pacer: makes episodes that are ready together take turns on the event loop.
        config: the agent's limits.
        sampling: the recipe's sampling, which a turn may change.
        recorder: the episode's spans.
        seed: the run's seed; None: turns are not seeded.
        group_id, sample_index: the group, and the index of this sample in it.
    """

    task: Task
    renderer: ChatRenderer
    generator: Generator
    session: ToolSession
    budget: Budget
    config: AgentConfig
    sampling: SamplingConfig
    interaction: InteractionSession | None = None
    images: ImageLoader = field(default_factory=ImageLoader)
    pacer: Pacer = field(default_factory=Pacer)
    recorder: Recorder = field(default_factory=Recorder)
    seed: int | None = None
    group_id: str = ""
    sample_index: int = 0

    @property
    def session_id(self) -> str:
        """Session id of the episode's requests: one replica serves all and caches the prefix."""
        return f"{self.group_id}/{self.sample_index}"
