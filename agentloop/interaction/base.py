"""`Interaction`: a simulated user, or an environment, that answers after the model's turns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentloop.types import Message, Task


@dataclass(slots=True)
class Response:
    """The answer of an interaction.

    Attributes:
        messages: shown to the model; with `done`, only written to the trace.
        reward: step reward of the turn that was answered, or None.
        done: the conversation is over.
    """

    messages: Sequence[Message] = ()
    reward: float | None = None
    done: bool = False


class Interaction(ABC):
    """Base of all interactions. One instance serves all episodes; `start` returns their state.

    An exception fails the episode, which is then masked and never scored 0. After an
    `InteractionError` the call is retried first.

    Args:
        config: the `config` mapping of the interactions YAML.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        self.config: dict[str, Any] = dict(config or {})

    async def start(self, task: Task, **kwargs: Any) -> Any:
        """Begin an episode and return its state. `kwargs`: the row's `interaction_kwargs` without
        the name."""
        return None

    @abstractmethod
    async def respond(self, state: Any, messages: Sequence[Message]) -> Response | tuple[Any, ...]:
        """Answer the model's last turn.

        Args:
            state: as `start` returned it.
            messages: the whole conversation; do not change it.

        Returns:
            A `Response`, or the tuple `(messages, reward, done)`.
        """

    async def close(self, state: Any) -> None:  # noqa: B027  # optional
        """End an episode, whatever its outcome."""
