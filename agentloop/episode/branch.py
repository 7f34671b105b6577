"""`Branch`: a trajectory under construction. Each fork and each rewrite adds one."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from agentloop.episode.ledger import TokenLedger
from agentloop.errors import RewardError
from agentloop.images import ImageFile, images_of
from agentloop.numbers import finite_number
from agentloop.types import Message, StepReward, StopReason, Trajectory, Turn


@dataclass(slots=True)
class BranchMetrics:
    """Counters and seconds of a branch; each is a metric of its trajectory, by the same name."""

    tool_calls: float = 0.0
    tool_errors: float = 0.0
    malformed_calls: float = 0.0
    user_turns: float = 0.0
    forks: float = 0.0
    generate_s: float = 0.0
    tool_s: float = 0.0
    interaction_s: float | None = None  # None: without an interaction, the metric is omitted
    converted_arguments: float | None = None  # None: none was written as text

    def as_dict(self) -> dict[str, float]:
        """Return the metrics that have a value, by name."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(slots=True, eq=False)
class Branch:
    """The state of a single trajectory. `fork` and `rewrite` set every field.

    Attributes:
        messages: the conversation so far.
        tools: schemas offered to the model; None offers none. Replaced as a whole, never changed in
            place.
        images: the images in the ledger, in order, one for each run of placeholders.
        path: its place in the tree of forks, for the seeds of its turns: `` for the first branch,
            `/0` for its first fork.
        before: the branch with the turns before this one's; None: this is the first.
        ledger: its tokens.
        pending: observed messages that are not in the ledger yet.
        forks: the branches made from it, in order.
        stop_reason: why the last generation, or the episode, ended.
        turn_stop: how the last sampled turn ended; the template's continuation depends on it.
        user_spoke: a user turn was counted since the last generation.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    images: list[ImageFile]
    path: str = ""
    before: Branch | None = None
    ledger: TokenLedger = field(default_factory=TokenLedger)
    pending: list[Message] = field(default_factory=list)
    step_rewards: list[StepReward] = field(default_factory=list)
    metrics: BranchMetrics = field(default_factory=BranchMetrics)
    forks: list[Branch] = field(default_factory=list)
    stop_reason: StopReason = StopReason.STOP
    turn_stop: StopReason = StopReason.STOP
    user_spoke: bool = False

    @property
    def turns(self) -> list[Turn]:
        return self.ledger.turns

    def show(self, observed: Sequence[Message], loaded: Sequence[Message]) -> None:
        """Take note that pending messages are in the ledger now, with their images decoded.

        Args:
            observed: the first of `pending`, as they were added.
            loaded: the same messages with `ImageFile`s.
        """
        del self.pending[: len(observed)]
        images = list(images_of(loaded))
        if images:
            self.images.extend(images)
            shown = {id(old): new for old, new in zip(observed, loaded, strict=True)}
            self.messages[:] = [shown.get(id(message), message) for message in self.messages]

    def fork(self, messages: Sequence[Message] | None) -> Branch:
        """Return a new branch from `messages`; None: with a masked copy of this one's past."""
        if messages is None:
            other = self._next(self.messages, self.images, self)
            other.ledger = self.ledger.copy()
            other.pending = list(self.pending)
        else:
            other = self._next(messages, [], self)
        self._add_fork(other)
        return other

    def rewrite(self, messages: Sequence[Message]) -> None:
        """Start again from `messages`; the tokens so far become a finished fork."""
        closed = self._next(self.messages, self.images, self.before)
        closed.ledger, closed.step_rewards = self.ledger, self.step_rewards
        self._add_fork(closed)

        # Metrics and forks stay here: they belong to the episode, not to its messages.
        self.messages, self.images = list(messages), []
        self.ledger, self.pending, self.step_rewards = TokenLedger(), [], []
        self.before = closed
        self.path = f"{self.path}/{len(self.forks)}"

    def add_reward(self, name: str, value: float, turn: Turn | None) -> None:
        """Record a step reward; see `Episode.add_reward`."""
        number = finite_number(value)
        if number is None:
            raise RewardError(
                f"the step reward {name!r} is {reprlib.repr(value)}, not a finite number", "rewards must be finite"
            )

        owner = self
        if turn is None:
            while not owner.turns and owner.before is not None:
                owner = owner.before
            if not owner.turns:
                raise ValueError(f"the step reward {name!r} comes before the first turn: call generate() first")
            turn = owner.turns[-1]
        elif not any(turn is own for own in self.turns):
            raise ValueError(f"the step reward {name!r} is for a turn of another trajectory")
        owner.step_rewards.append(StepReward(name, number, turn.start, turn.end))

    def trajectories(self, identity: dict[str, Any]) -> list[Trajectory]:
        """Return the finished sequences: forks first, this one last; none for unsampled branches.

        Args:
            identity: the fields of `Trajectory` that identify the episode.
        """
        found = [trajectory for fork in self.forks for trajectory in fork.trajectories(identity)]
        if self.turns:
            found.append(
                self.ledger.trajectory(
                    **identity,
                    messages=self.messages,
                    images=self.images,
                    step_rewards=self.step_rewards,
                    stop_reason=self.stop_reason,
                    metrics={**self.metrics.as_dict(), "turns": float(len(self.turns))},
                )
            )
        return found

    def _next(self, messages: Sequence[Message], images: Sequence[ImageFile], before: Branch | None) -> Branch:
        return Branch(
            messages=list(messages),
            tools=self.tools,
            images=list(images),
            path=f"{self.path}/{len(self.forks)}",
            before=before,
            stop_reason=self.stop_reason,
            turn_stop=self.turn_stop,
            user_spoke=self.user_spoke,
        )

    def _add_fork(self, other: Branch) -> None:
        self.forks.append(other)
        self.metrics.forks += 1
