"""The error tree: every user-visible error. Each can be pickled and says what to do.

AgentloopError
├── UserError                 the user wrote something wrong: shown without a traceback, exit code 2
│   ├── ConfigError           recipe, override, environment
│   ├── DataError             dataset file or row
│   │   └── ImageError        an image is damaged, too large, or no image
│   ├── ModelError            model folder, tokenizer, chat template
│   ├── ToolConfigError       tool YAML
│   ├── RegistryError         unknown or broken entry point
│   ├── RunDirError           the run directory holds a run, or cannot be resumed
│   └── TraceError            a trace is missing, cut or of an unknown format
├── InfrastructureError       not the model's fault: retried, then the episode fails and is masked
│   ├── ServerError           the rollout server cannot be reached or answered 5xx
│   │   └── ServerStartError  it did not start: carries the last lines of its log
│   ├── ToolError             a tool's machinery failed (not: the model called it wrongly)
│   │   └── ToolUnavailable   what it is in front of was away for longer than it is waited for
│   ├── InteractionError      a simulated user or environment raised or hung
│   ├── RewardError           a reward raised or returned something other than a finite number
│   ├── WorkerError           a trainer worker died or answered with an error
│   ├── ExportError           spans could not be sent to their destination
│   └── DiskError             a file could not be written: the disk is full, read-only or broken
├── CallFailed                a tool or reward in a process raised, or its process died
├── CodeEnded                 user code ended its task or the program: sys.exit(), CancelledError
├── FunctionHangs             too many calls of a tool or reward hang in threads
├── RequestRejected           the server refused the request (4xx): never retried
├── TokenLawError             a trajectory breaks DESIGN section 3
└── RunError                  the run cannot continue; the text lists the first causes

Exceptions that never reach a user are defined next to the code that catches them: signals within a
few modules (`EpisodeEnd`, `CallError`, `LayoutError`, `StalledError`, `Conflict`), refinements of a
class above (`RankDied`), and the rollout server's own tree, which becomes HTTP status codes
(rollout_server/errors.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from typing import Any


class AgentloopError(Exception):
    """Base of all errors that this project raises deliberately.

    Args:
        message: what is wrong, naming the key, row or request.
        hint: how to fix it; shown on a separate line.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own __reduce__ would drop the hint when the error crosses a process.
        return (type(self), (self.message, self.hint))


class UserError(AgentloopError):
    """Something the user wrote is wrong. The command line shows it without a traceback."""


class ConfigError(UserError):
    """A recipe, an override or the environment is wrong."""


class DataError(UserError):
    """A dataset file or row is wrong. The message names file, row and column."""


class ImageError(DataError):
    """An image cannot be read: it is damaged, too large, or not an image.

    Args:
        number: its place, from 1, among the images of the messages that were rendered or loaded;
            None: it was not read for messages.
    """

    def __init__(self, message: str, hint: str | None = None, number: int | None = None) -> None:
        super().__init__(message, hint)
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.hint, self.number)


class ModelError(UserError):
    """A model path, tokenizer or chat template cannot be used."""


class ToolConfigError(UserError):
    """A tool YAML is wrong or names a class that cannot be imported."""


class RegistryError(UserError):
    """A name is not registered, or its entry point cannot be loaded."""


class RunDirError(UserError):
    """The run directory already holds a run, or has no run to resume."""


class TraceError(UserError):
    """A trace, or an episode in it, is missing, cut or of an unknown format."""


class InfrastructureError(AgentloopError):
    """Infrastructure failed, not the model: retried with a bound, then the episode is masked."""


class ServerError(InfrastructureError):
    """The rollout server cannot be reached or answered with a server error."""


class ServerStartError(ServerError):
    """The rollout server did not start. The message ends with the last lines of its log."""


class ToolError(InfrastructureError):
    """A tool's machinery failed. A wrong call by the model is a `ToolResult` with `error`.

    Args:
        final: the tool has retried by itself; the call is not repeated.
    """

    def __init__(self, message: str, hint: str | None = None, final: bool = False) -> None:
        super().__init__(message, hint)
        self.final = final

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.hint, self.final)


class ToolUnavailable(ToolError):
    """A service could not be reached for as long as its tool waits for it (`outage_s`).

    A run in which most of the episodes that call the tool end with this error ends too.
    """


class InteractionError(InfrastructureError):
    """An interaction failed and should be retried. Its other exceptions are final."""


class RewardError(InfrastructureError):
    """A reward function raised, timed out or returned something other than a finite number."""


class WorkerError(InfrastructureError):
    """A trainer worker died or reported an error."""


class ExportError(InfrastructureError):
    """Spans could not be sent to their destination.

    Args:
        final: sending the same spans again cannot help.
        unreachable: no connection was made, so that the spans are not the cause.
    """

    def __init__(
        self, message: str, hint: str | None = None, final: bool = False, *, unreachable: bool = False
    ) -> None:
        super().__init__(message, hint)
        self.final = final
        self.unreachable = unreachable

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), unreachable=self.unreachable), (self.message, self.hint, self.final)


class DiskError(InfrastructureError):
    """A file could not be written. The message names it and the free space of its disk."""


class CallFailed(AgentloopError):
    """A call in a process failed. The message is `Type: text`, or how the process died.

    Args:
        frames: where the function raised, as `agentloop.faults.user_frames` returns it.
    """

    def __init__(self, message: str, hint: str | None = None, frames: Sequence[tuple[str, int, str, str]] = ()) -> None:
        super().__init__(message, hint)
        # From a process they arrive as lists.
        self.frames = [(file, line, function, text) for file, line, function, text in frames]

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.message, self.hint, self.frames))


class CodeEnded(AgentloopError):
    """User code called `sys.exit()`, or cancelled itself: an exception of that code, as any other.

    Passed on, the first would end the process, and the second would look like the end of the run.
    """


class FunctionHangs(AgentloopError):
    """Too many calls of one function hang in threads; no further call is started."""


class RequestRejected(AgentloopError):
    """The server answered 4xx: repeating the request cannot help."""


class LawRule(StrEnum):
    """The rule that a rejected trajectory breaks; metrics count each as `rejected/<value>`. Closed.

    Numbers are those of the token law (DESIGN section 3).
    """

    SAMPLED = "sampled"  # 1: mask 1 exactly where an engine sampled, with its logprob and version
    PROMPT = "prompt"  # 2: a turn was sampled after exactly the ids before it
    TRAINED_TWICE = "trained_twice"  # 4: a sampled turn has mask 1 in one trajectory only
    COLUMNS = "columns"  # 5: ids, mask, logprobs and versions have one length
    EMPTY = "empty"  # no prompt, or nothing sampled after it
    IMAGES = "images"  # each image has one run of placeholders, and none of them was sampled
    STEP_REWARD = "step_reward"  # a step reward belongs to a sampled turn and is a finite number
    FORM = "form"  # the JSON is not a trajectory


class TokenLawError(AgentloopError):
    """A trajectory breaks a rule of the token law: every trained token was sampled.

    Args:
        rule: the broken rule.
    """

    def __init__(self, message: str, hint: str | None = None, rule: LawRule = LawRule.FORM) -> None:
        super().__init__(message, hint)
        self.rule = rule

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.message, self.hint, self.rule))


class RunError(AgentloopError):
    """The run cannot continue. The message lists the first causes."""
