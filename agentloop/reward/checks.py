"""What can be known of a reward function before it is called: its arguments, and what it reads."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any

from agentloop.errors import ConfigError

MOST_FUNCTIONS = 200
"""Functions that are searched for what a reward reads."""

ARGUMENTS = ("task", "text", "trajectory")
SIGNATURE = f"score({', '.join(ARGUMENTS)})"

FOREIGN = frozenset(
    {"data_source", "solution_str", "ground_truth", "extra_info", "completion", "completions", "prompt", "prompts"}
)
"""Names of arguments that rewards of other frameworks have (verl, TRL, verifiers)."""


def check_reward(function: Any, reference: str) -> None:
    """Refuse what cannot be called as a reward function.

    Raises:
        ConfigError: it is not a function, or does not take the three arguments.
    """
    if inspect.isclass(function) or not callable(function):
        raise ConfigError(f"reward: {reference} is not a function", f"name a function {SIGNATURE}")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigError(f"reward: {reference} is a generator", "return the score instead of yielding it")
    try:
        inspect.signature(function).bind(None, "", None)
    except TypeError as exc:
        taken = inspect.signature(function)
        raise ConfigError(
            f"reward: {reference}{taken} cannot be called with a task, a text and a trajectory: {exc}",
            f"define it as {SIGNATURE}",
        ) from exc
    except ValueError:  # written in C, without a signature
        return
    _check_names(list(inspect.signature(function).parameters), reference)


def _check_names(names: list[str], reference: str) -> None:
    """Refuse a function whose arguments are those of another framework, or in another order.

    They are passed by position, so such a function would score the wrong things without an error.

    Raises:
        ConfigError: an argument among the first three has the name of another one.
    """
    for place, (name, got) in enumerate(zip(names, ARGUMENTS, strict=False)):
        if name in FOREIGN or name in ARGUMENTS[:place] + ARGUMENTS[place + 1 :]:
            raise ConfigError(
                f"reward: {reference}: its argument {name!r} would receive the {got}, because a reward is called as "
                f"{SIGNATURE}",
                f"define {SIGNATURE}, and call your function from it, e.g. with task.ground_truth and text",
            )


def mentions(function: Any, name: str) -> bool:
    """Whether the code of a function, or of a function of its package that it uses, has a name.

    Found are attributes (`task.ground_truth`), keyword arguments, and the name as text. It is a
    hint for messages: code that is read may never run.
    """
    return any(
        name in code.co_names or any(name == const or _names(const, name) for const in code.co_consts)
        for code in _codes(function)
    )


def _names(const: Any, name: str) -> bool:
    """Whether a constant is the names of a call's keyword arguments, and holds this one."""
    return isinstance(const, tuple) and name in const


def _codes(function: Any) -> Iterator[CodeType]:
    waiting = [function]
    seen: set[int] = set()
    while waiting and len(seen) < MOST_FUNCTIONS:
        current = _plain_function(waiting.pop())
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        for code in _nested(current.__code__):
            yield code
            used = (current.__globals__.get(name) for name in code.co_names)
            waiting += [other for other in used if callable(other) and _package(other) == _package(current)]


def _plain_function(function: Any) -> FunctionType | None:
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    if not inspect.isroutine(function):
        function = vars(type(function)).get("__call__")
    return function if isinstance(function, FunctionType) else None


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _nested(const)


def _package(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__module__", "")).split(".")[0]
