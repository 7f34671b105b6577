"""Bounds on what the rendering of a chat template may compute.

Loops and calls are counted: a loop over a list counts its length when it begins, so that a step
costs nothing more, and a filter the length of its input. The operators that can make a large value
out of two small ones look at its size first. Filters and methods that take a width or a replacement
(`center`, `indent`, `replace`) are not bounded here.
"""

from __future__ import annotations

import operator
import re
import threading
from collections.abc import Callable, Iterator, Sized
from functools import partial
from typing import Any

from jinja2 import TemplateRuntimeError, nodes, pass_context
from jinja2.runtime import LoopContext
from jinja2.visitor import NodeTransformer

MAX_STEPS = 2**21
"""Most steps of loops in a rendering; a long conversation takes thousands."""

CALL_STEPS = 16
"""Cost of a call, in steps of a loop."""

CHARACTERS_A_STEP = 64
"""Characters of text that a filter processes in the time of one step."""

MAX_LENGTH = 2**26
"""Most characters of a text, or entries of a list, that an operator makes."""

MAX_BITS = 2**16
"""Most bits of a number that an operator makes."""


class TooMuchWork(TemplateRuntimeError):
    """The template computes without end, or nearly so."""


class _Steps(threading.local):
    left = MAX_STEPS


_steps = _Steps()


def begin() -> None:
    """Begin to count a rendering of this thread."""
    _steps.left = MAX_STEPS


def bound(environment: Any) -> None:
    """Make an environment's templates count their work."""
    environment.filters["agentloop_counted"] = _counted
    environment.filters["agentloop_weighed"] = _weighed
    environment.filters["agentloop_sized"] = _sized
    environment.intercepted_binops = frozenset(("+", "*", "**", "%"))
    environment.binop_table = {**environment.binop_table, "+": _add, "*": _multiply, "**": _power, "%": _format}
    environment.call = partial(_call, environment.call)
    environment._generate = partial(_generate, environment, environment._generate)


def _generate(environment: Any, plain: Callable[..., str], source: nodes.Template, *args: Any, **options: Any) -> str:
    """Write the Python program of a template, whose loops are counted."""
    _Counting().visit(source)
    source.set_environment(environment)
    return plain(source, *args, **options)


class _Counting(NodeTransformer):
    """Puts the filters above around the inputs of loops and filters, and what `~` joins."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # Jinja's name
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "agentloop_counted")
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        self.generic_visit(node)
        if node.node is not None:  # None in a filter block
            node.node = _filtered(node.node, "agentloop_weighed")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "agentloop_sized")


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    assert isinstance(node, nodes.Expr)
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _count(steps: int) -> None:
    _steps.left -= steps
    if _steps.left < 0:
        raise TooMuchWork(f"it takes more than {MAX_STEPS:,} steps of loops and calls: does one of its loops ever end?")


@pass_context  # so that Jinja does not compute it for a constant when it compiles
def _counted(_: Any, values: Any) -> Any:
    if isinstance(values, Sized):
        _count(len(values) + 1)
    elif isinstance(values, Iterator):
        return _each(values)
    return values


@pass_context
def _weighed(context: Any, values: Any) -> Any:
    if isinstance(values, str):
        _count(len(values) // CHARACTERS_A_STEP + 1)
        return values
    return _counted(context, values)


def _each(values: Any) -> Iterator[Any]:
    for value in values:
        _count(1)
        yield value


def _call(plain: Callable[..., Any], context: Any, function: Any, *args: Any, **options: Any) -> Any:
    if type(function) is LoopContext and args:  # the next level of a recursive loop
        args = (_counted(context, args[0]), *args[1:])
    _count(CALL_STEPS)
    return plain(context, function, *args, **options)


@pass_context
def _sized(_: Any, text: Any) -> Any:
    _check_length(len(text))
    return text


def _check_length(length: int) -> None:
    if length > MAX_LENGTH:
        raise TooMuchWork(f"it makes a value of {length:,} characters or entries, of at most {MAX_LENGTH:,}")


def _add(left: Any, right: Any) -> Any:
    if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
        _check_length(len(left) + len(right))
    return left + right


def _multiply(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    elif isinstance(left, Sized) and isinstance(right, int):
        _check_length(len(left) * right)
    elif isinstance(right, Sized) and isinstance(left, int):
        _check_length(len(right) * left)
    return left * right


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * right)
    return operator.pow(left, right)


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise TooMuchWork(f"it computes a number of up to {bits:,} bits, of at most {MAX_BITS:,}")


_WIDTH = re.compile(r"%[^a-zA-Z%]*?(\d{6,})")  # smaller widths are harmless


def _format(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        _check_length(sum(int(width[:20]) for width in _WIDTH.findall(left)))
    return left % right
