"""`InteractionSession`: the interaction of one episode, with its retries, timeouts and checks."""

from __future__ import annotations

import asyncio
import reprlib
from collections.abc import Sequence
from typing import Any

from agentloop.errors import InteractionError
from agentloop.faults import contained
from agentloop.interaction.base import Interaction, Response
from agentloop.numbers import finite_number
from agentloop.types import LONGEST_TEXT, Message, Task

RETRIES = 2
CLOSE_TIMEOUT_S = 30.0
ROLES = ("user", "system", "tool", "developer")
"""Roles of an answer. An interaction never writes assistant messages."""


class _Unusable(InteractionError):
    """The answer has the wrong form; a retry cannot help."""


class InteractionSession:
    """One episode's interaction: started at its first answer, closed by `close`."""

    def __init__(self, name: str, interaction: Interaction, task: Task, kwargs: dict[str, Any]) -> None:
        self.name = name
        self._interaction = interaction
        self._task = task
        self._kwargs = kwargs
        self._state: Any = None
        self._started = False
        self._turns = asyncio.Lock()

    async def respond(self, messages: Sequence[Message], timeout_s: float) -> Response:
        """Return the answer to the model's last turn. Forks share it: one call at a time.

        Raises:
            InteractionError: it raised, took too long, or gave an invalid answer.
        """
        async with self._turns:
            return await self._respond(messages, timeout_s)

    async def _respond(self, messages: Sequence[Message], timeout_s: float) -> Response:
        for attempt in range(RETRIES + 1):
            clock = asyncio.timeout(timeout_s)
            try:
                async with clock:
                    with contained():
                        if not self._started:
                            self._state = await self._interaction.start(self._task, **self._kwargs)
                            self._started = True
                        answer = await self._interaction.respond(self._state, list(messages))
                    return self._checked(answer)
            except InteractionError as exc:
                if attempt == RETRIES or isinstance(exc, _Unusable):
                    raise
                await asyncio.sleep(0.1 * 2**attempt)
            except Exception as exc:
                if isinstance(exc, TimeoutError) and clock.expired():
                    raise InteractionError(
                        f"the interaction {self.name} took longer than {timeout_s:g} s",
                        "raise agents.<name>.interaction_timeout_s, or make it faster",
                    ) from exc
                raise InteractionError(f"the interaction {self.name} raised {type(exc).__name__}: {exc}") from exc
        raise AssertionError("unreachable")

    async def close(self) -> None:
        """Close the interaction if it was started; ignore a failure to close."""
        if not self._started:
            return

        self._started = False
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._interaction.close(self._state)
        except Exception:  # noqa: BLE001  # the episode has ended, so a failure has no effect
            return

    def _checked(self, answer: Any) -> Response:
        if isinstance(answer, tuple) and len(answer) == 3:
            answer = Response(answer[0] or (), answer[1], bool(answer[2]))
        if not isinstance(answer, Response):
            raise _Unusable(
                f"the interaction {self.name} answered with {type(answer).__name__}",
                "return agentloop.Response, or the tuple (messages, reward, done)",
            )

        for message in answer.messages:
            # Content that is not text would fail late, in the chat template.
            usable = isinstance(message, dict) and message.get("role") in ROLES
            if not usable or not isinstance(message.get("content"), str | list):
                raise _Unusable(
                    f"the interaction {self.name} answered with the message {message!r}",
                    f"messages are {{role, content}}, with the role {', '.join(ROLES)}",
                )

            content = message["content"]
            length = (
                len(content) if isinstance(content, str) else sum(len(str(part.get("text", ""))) for part in content)
            )
            if length > LONGEST_TEXT:
                raise _Unusable(
                    f"the interaction {self.name} answered with a message of {length:,} characters",
                    f"answer with at most {LONGEST_TEXT:,}",
                )

        if not answer.messages and not answer.done:
            raise _Unusable(
                f"the interaction {self.name} returned no messages and is not done", "return messages, or set done"
            )
        if answer.reward is None:
            return answer
        reward = finite_number(answer.reward)
        if reward is None:
            raise _Unusable(
                f"the interaction {self.name} returned the reward {reprlib.repr(answer.reward)}",
                "return a finite number or None",
            )
        return Response(answer.messages, reward, answer.done)
