"""The error tree. Every error a user can meet is named here, is picklable, and its text says what to do.

AgentloopError
├── UserError                 something the user wrote is wrong: shown without a traceback, exit code 2
│   ├── ConfigError           recipe, override, environment
│   ├── DataError             dataset file or row
│   ├── ModelError            model folder, tokenizer, chat template
│   ├── ToolConfigError       tool YAML
│   ├── RegistryError         unknown or broken entry point
│   └── RunDirError           the run directory holds a run, or cannot be resumed
├── InfrastructureError       not the model's doing: retried with a bound, then the episode fails and is masked
│   ├── ServerError           the rollout server cannot be reached or answered 5xx
│   │   └── ServerStartError  it never came up: carries the last lines of its log
│   ├── ToolError             a tool's machinery failed (not: the model called it wrongly)
│   ├── InteractionError      a simulated user or environment raised or hung
│   ├── RewardError           a reward raised or gave no finite number
│   └── WorkerError           a trainer worker died or answered with an error
├── RequestRejected           the server refused the request as wrong (4xx): a bug or a config fault, never retried
├── TokenLawError             a trajectory that breaks DESIGN section 3
└── RunError                  the run cannot go on; the text lists the first causes
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any


class AgentloopError(Exception):
    """Root of all errors raised on purpose by this project.

    Args:
        message: what happened, naming the key, row or request.
        hint: what to do about it; shown on a line of its own.
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
    """Something the user wrote is wrong; the command line shows it without a traceback."""


class ConfigError(UserError):
    """A recipe, an override or the environment is wrong."""


class DataError(UserError):
    """A dataset file or row is wrong; the message names file, row and column."""


class ModelError(UserError):
    """A model path, tokenizer or chat template cannot be used."""


class ToolConfigError(UserError):
    """A tool YAML is wrong or names a class that cannot be imported."""


class RegistryError(UserError):
    """A name is registered nowhere, or its entry point cannot be loaded."""


class RunDirError(UserError):
    """The run directory already holds a run, or holds none to resume."""


class InfrastructureError(AgentloopError):
    """A failure that is not the model's: bounded retry, then the episode is failed and masked."""


class ServerError(InfrastructureError):
    """The rollout server cannot be reached or answered with a server error."""


class ServerStartError(ServerError):
    """The rollout server did not come up; the message ends with the last lines of its log."""


class ToolError(InfrastructureError):
    """A tool's machinery failed. A wrong call by the model is a `ToolResult` with `error` set instead."""


class InteractionError(InfrastructureError):
    """An interaction failed. Raised by one on purpose it says that trying again may help; anything else is final."""


class RewardError(InfrastructureError):
    """A reward function raised, timed out or returned something that is no finite number."""


class WorkerError(InfrastructureError):
    """A trainer worker died or reported an error."""


class RequestRejected(AgentloopError):
    """The server answered 4xx: sending the same request again cannot help."""


class LawRule(StrEnum):
    """What a rejected trajectory breaks; metrics count each as `rejected/<value>`. Closed.

    The numbers are those of the token law (DESIGN section 3).
    """

    SAMPLED = "sampled"  # 1: mask 1 exactly where an engine sampled, with its own logprob and version
    PROMPT = "prompt"  # 2: a turn was sampled behind exactly the ids that stand before it
    TRAINED_TWICE = "trained_twice"  # 4: a sampled turn has mask 1 in one trajectory of its episode only
    COLUMNS = "columns"  # 5: ids, mask, logprobs and versions have one length
    EMPTY = "empty"  # there is no prompt, or nothing was sampled behind it
    STEP_REWARD = "step_reward"  # a step reward belongs to a sampled turn and is a finite number
    FORM = "form"  # what was read is no trajectory


class TokenLawError(AgentloopError):
    """A trajectory breaks one of the rules that make every trained token a sampled one.

    Args:
        rule: which.
    """

    def __init__(self, message: str, hint: str | None = None, rule: LawRule = LawRule.FORM) -> None:
        super().__init__(message, hint)
        self.rule = rule

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.message, self.hint, self.rule))


class RunError(AgentloopError):
    """The run cannot go on; the message lists the first causes."""
