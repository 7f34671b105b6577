"""Check the arguments that a row gives to tools (`extra_info.tools_kwargs`) before the run."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from agentloop.errors import DataError
from agentloop.text import did_you_mean
from agentloop.tool.base import Tool
from agentloop.types import TOOL_KWARGS, Task

_METHODS = dict(zip(TOOL_KWARGS, ("open", "execute", "reward", "close"), strict=True))
_POSITIONAL = {"open": 1, "execute": 2, "reward": 1, "close": 1}


def check_row_kwargs(tools: Mapping[str, Tool], task: Task, where: str) -> None:
    """Check a row's arguments against the tools that it names.

    A run without tools may use rows that were made for tools.

    Args:
        where: the row, for messages.

    Raises:
        DataError: a tool does not exist, or a method of it does not take an argument.
    """
    for name in task.extra_info.get("tools_kwargs") or () if tools else ():
        place = f"{where}: column 'extra_info.tools_kwargs'"
        tool = tools.get(name)
        if tool is None:
            close = difflib.get_close_matches(str(name), tools, n=1)
            meant = f"did you mean {close[0]!r}? " if close else ""
            raise DataError(
                f"{place} names the tool {name!r}; the tools are: {', '.join(tools)}",
                f"{meant}correct the row, or add the tool to the YAML that `tools` names",
            )
        check_tool_kwargs(tool, task.tool_kwargs(name), f"{place}, {name}.", "correct the row")


def check_tool_kwargs(tool: Tool, by_kind: Mapping[str, Mapping[str, Any]], place: str, fix: str) -> None:
    """Check the arguments for one tool, by the `TOOL_KWARGS` that they are for.

    Args:
        place: what comes before such a kind in messages: `the row, count.`.
        fix: what to do with wrong arguments, for messages.

    Raises:
        DataError: a method of the tool does not take an argument.
    """
    for kind, kwargs in by_kind.items():
        method = _METHODS.get(kind)
        if method is not None and (fault := _fault(tool, method, kwargs)):
            raise DataError(
                f"{place}{kind}: {type(tool).__name__}.{method}() {fault[0]}",
                fault[1] or f"{fix}, or the arguments of {method}()",
            )


def _fault(tool: Tool, method: str, kwargs: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return why a method cannot be called with these arguments, and a fix; None: it can be."""
    signature = _signature(tool, method)
    if signature is None:
        return None
    try:
        signature.bind(*[None] * _POSITIONAL[method], **kwargs)
    except TypeError as exc:
        return f"{exc}; it takes {signature}", ""
    if tool.takes_from_row is None or _overridden(tool, method):
        return None
    named = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    known = [*(each.name for each in named[_POSITIONAL[method] :]), *tool.takes_from_row.get(method, ())]
    unknown = [name for name in kwargs if name not in known]
    if not unknown:
        return None
    takes = f"it takes {', '.join(dict.fromkeys(known))}" if known else "it takes none"
    return f"got an unexpected keyword argument {unknown[0]!r}; {takes}", did_you_mean(unknown[0], known, "")


def _overridden(tool: Tool, method: str) -> bool:
    """Whether a subclass has a method of its own, which `takes_from_row` of its base leaves out."""
    own = [method in vars(kind) for kind in type(tool).__mro__].index(True)
    said = ["takes_from_row" in vars(kind) for kind in type(tool).__mro__].index(True)
    return "takes_from_row" not in vars(tool) and own < said


@lru_cache(maxsize=256)
def _signature(tool: Tool, method: str) -> inspect.Signature | None:
    try:
        return inspect.signature(getattr(tool, method))
    except (TypeError, ValueError):  # written in C
        return None
