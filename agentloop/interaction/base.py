"""Interactions: a simulated user, or an environment, that answers after the model's turns."""

from __future__ import annotations

import asyncio
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from agentloop.errors import ConfigError, InteractionError, RegistryError
from agentloop.imports import read_entries
from agentloop.registry import INTERACTIONS, load, load_reference, registered
from agentloop.types import Message, Task

RETRIES = 2
CLOSE_TIMEOUT_S = 30.0
ROLES = ("user", "system", "tool", "developer")
"""Who may answer a model. It is never answered in its own voice."""


@dataclass(slots=True)
class Response:
    """What an interaction answers.

    Attributes:
        messages: what the model is told; the last thing that is said when `done`.
        reward: for the turn that was answered, a step reward; None: none.
        done: the conversation is over.
    """

    messages: Sequence[Message] = ()
    reward: float | None = None
    done: bool = False


class Interaction(ABC):
    """Base of all interactions. One instance serves all episodes; what belongs to an episode is the state.

    What it raises fails the episode, which is then masked and never scored 0. `InteractionError` says that trying again
    may help: the call is repeated first.

    Args:
        config: the `config` mapping of the interactions YAML.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        self.config: dict[str, Any] = dict(config or {})

    async def start(self, task: Task, **kwargs: Any) -> Any:
        """Begin an episode; returns its state. `kwargs` are the row's `extra_info.interaction_kwargs`, without name."""
        return None

    @abstractmethod
    async def respond(self, state: Any, messages: Sequence[Message]) -> Response | tuple[Any, ...]:
        """Answer the model's last turn.

        Args:
            state: as `start` returned it.
            messages: the whole conversation; not to be changed.

        Returns:
            A `Response`, or the tuple `(messages, reward, done)`.
        """

    async def close(self, state: Any) -> None:  # noqa: B027  # need not be written
        """End an episode, whatever its outcome."""


class Interactions:
    """The interactions of a run, by the name that rows choose them by.

    Those that packages registered in the entry-point group `agentloop.interactions` need no entry in a YAML.
    """

    def __init__(self, named: Mapping[str, Interaction] | None = None) -> None:
        self.named: dict[str, Interaction] = dict(named or {})

    def check(self, task: Task, where: str) -> str | None:
        """Load what a row names; returns the name, None where it names none.

        Args:
            where: the row, for messages.

        Raises:
            ConfigError: it names an interaction that is nowhere.
            RegistryError: what is registered cannot be used.
        """
        kwargs = task.interaction_kwargs
        if kwargs is None:
            return None
        name = kwargs.get("name")
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{where} has interaction_kwargs without a name", 'add "name": "<an interaction>"')
        if name not in self.named:
            known = sorted({*self.named, *registered(INTERACTIONS)})
            if name not in known:
                raise ConfigError(
                    f"{where} names the interaction {name!r}; known: {', '.join(known) or 'none'}",
                    "correct the row, add it to the YAML that `interactions` names, or install its package",
                )
            self.named[name] = _made(load(INTERACTIONS, name), {}, f"interaction {name!r}")
        return name

    def session(self, task: Task) -> InteractionSession | None:
        """The interaction of one episode; None: its row has none."""
        kwargs = task.interaction_kwargs
        if kwargs is None:
            return None
        rest = {key: value for key, value in kwargs.items() if key != "name"}
        return InteractionSession(kwargs["name"], self.named[kwargs["name"]], task, rest)


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
        """The answer to the model's last turn. Forks share one interaction, which answers them one after the other.

        Raises:
            InteractionError: it raised, took too long, or answered in no usable form.
        """
        async with self._turns:
            return await self._respond(messages, timeout_s)

    async def _respond(self, messages: Sequence[Message], timeout_s: float) -> Response:
        for attempt in range(RETRIES + 1):
            clock = asyncio.timeout(timeout_s)
            try:
                async with clock:
                    if not self._started:
                        self._state = await self._interaction.start(self._task, **self._kwargs)
                        self._started = True
                    return self._checked(await self._interaction.respond(self._state, list(messages)))
            except InteractionError as exc:
                if attempt == RETRIES or isinstance(exc, _Unusable):
                    raise
                await asyncio.sleep(0.1 * 2**attempt)
            except Exception as exc:
                if isinstance(exc, TimeoutError) and clock.expired():
                    raise InteractionError(
                        f"the interaction {self.name} took longer than {timeout_s:g} s",
                        "raise agents.<name>.interaction_timeout_s, or make it quicker",
                    ) from exc
                raise InteractionError(f"the interaction {self.name} raised {type(exc).__name__}: {exc}") from exc
        raise AssertionError("unreachable")

    async def close(self) -> None:
        """Close what was started; one that fails to close, or hangs, keeps nothing else open."""
        if not self._started:
            return
        self._started = False
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._interaction.close(self._state)
        except Exception:  # noqa: BLE001  # the episode has ended: there is nobody left to tell
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
            if not isinstance(message, dict) or message.get("role") not in ROLES or "content" not in message:
                raise _Unusable(
                    f"the interaction {self.name} answered with the message {message!r}",
                    f"messages are {{role, content}}, with the role {', '.join(ROLES)}",
                )
        if not answer.messages and not answer.done:
            raise _Unusable(
                f"the interaction {self.name} answered nothing and is not done", "give messages, or set done"
            )
        reward: Any = answer.reward
        if reward is not None and not (isinstance(reward, Real) and math.isfinite(reward)):
            raise _Unusable(f"the interaction {self.name} gave the reward {reward!r}", "give finite numbers, or None")
        return answer


class _Unusable(InteractionError):
    """An answer in no usable form: asking again cannot help."""


def load_interactions(path: Path) -> Interactions:
    """Load an interactions YAML: `interaction: [{name, class_name, config}]`.

    `class_name` is `module.path.Class`, `path.py:Class` relative to the YAML, or a name that a package registered in
    the entry-point group `agentloop.interactions`. `name` is what rows call it; without one it is the class_name.

    Raises:
        ConfigError: naming file, entry and class.
    """
    entries = read_entries(path, "interaction", "{name: .., class_name: .., config: {..}}", ConfigError)
    named: dict[str, Interaction] = {}
    for number, entry in enumerate(entries, 1):
        where = f"{path}, interaction {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("class_name"), str):
            raise ConfigError(f"{where} has no class_name", "name a class, for instance my_pkg.users.PatientUser")
        name = str(entry.get("name") or entry["class_name"])
        if name in named:
            raise ConfigError(f"{where}: two interactions are called {name!r}", "give each a name of its own")
        try:
            kind = load_reference(entry["class_name"], path.parent, INTERACTIONS)
        except (ConfigError, RegistryError) as exc:
            raise ConfigError(f"{where}: {exc.message}", exc.hint) from exc
        named[name] = _made(kind, entry.get("config") or {}, f"{where}: {entry['class_name']}")
    return Interactions(named)


def _made(kind: Any, config: Mapping[str, Any], where: str) -> Interaction:
    if not (inspect.isclass(kind) and issubclass(kind, Interaction)):
        raise ConfigError(f"{where} is no Interaction", "subclass agentloop.Interaction")
    if inspect.isabstract(kind):
        raise ConfigError(f"{where} does not say what it answers", "write its method respond()")
    for method in ("start", "respond", "close"):
        if not inspect.iscoroutinefunction(getattr(kind, method)):
            raise ConfigError(
                f"{where}: {method}() is no `async def`", "make it one; run what blocks in asyncio.to_thread"
            )
    try:
        return kind(config)
    except Exception as exc:
        raise ConfigError(f"{where} cannot be made: {type(exc).__name__}: {exc}", "see its `config`") from exc
