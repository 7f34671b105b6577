"""A calculator: evaluates arithmetic from a parsed syntax tree, never with `eval`."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any, cast

from agentloop.tool.base import NOTHING_FROM_ROW, Tool
from agentloop.types import ToolResult
from tools.parsing import parse

MAX_CHARACTERS = 500
MAX_BITS = 4096
"""Larger integers are refused: a model may write 9**9**9."""

Number = int | float

BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def evaluate(expression: str) -> Number:
    """Return the value of an arithmetic expression: numbers, + - * / // % **, parentheses.

    Raises:
        ValueError: not arithmetic, or its value is out of bounds. The model reads this text.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"the expression has more than {MAX_CHARACTERS} characters")

    try:
        value = _value(parse(expression.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("not an arithmetic expression") from None
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except OverflowError:
        raise ValueError("the result is too large") from None

    if isinstance(value, float) and not math.isfinite(value):  # 1e999 is infinite
        raise ValueError("the result is too large")
    return value


def format_number(value: Number) -> str:
    """Format whole numbers without a fraction, others with up to ten significant digits."""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.10g}"
    return str(value)


def _value(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=op, operand=operand) if type(op) in UNARY:
            return cast("Number", UNARY[type(op)](_value(operand)))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            return _binary(op, _value(left), _value(right))
    raise ValueError("only numbers, + - * / // % ** and parentheses can be used")


def _binary(op: ast.operator, left: Number, right: Number) -> Number:
    if isinstance(op, ast.Pow):
        bits = left.bit_length() if isinstance(left, int) else 64
        if abs(right) > MAX_BITS or (isinstance(right, int) and bits * abs(right) > MAX_BITS):
            raise ValueError("the power is too large")

    result = BINARY[type(op)](left, right)
    if isinstance(result, complex):
        raise ValueError("the result is not a real number")
    if isinstance(result, int) and result.bit_length() > MAX_BITS:
        raise ValueError("the result is too large")
    return cast("Number", result)


class Calculator(Tool):
    """Evaluate the argument `expression`."""

    takes_from_row = NOTHING_FROM_ROW

    async def execute(self, state: Any, arguments: dict[str, Any], **execute_kwargs: Any) -> ToolResult:
        try:
            return ToolResult(format_number(evaluate(arguments["expression"])))
        except ValueError as exc:
            return ToolResult(f"Error: {exc}", error=str(exc))
