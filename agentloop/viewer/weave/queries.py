"""The query language of weave's client, as SQL over columns and JSON documents.

`{"$expr": {"$eq": [{"$getField": "attributes.step"}, {"$literal": 3}]}}` and its kin. A field that
a document does not have makes a comparison false, so `$not` of it holds. A text that is a number
equals that number, and the other way around: clients send either.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from agentloop.viewer.weave.values import time_of
from agentloop.web.refusals import Refusal

DEEPEST = 32
"""Most levels of a query."""

MOST_OPERANDS = 10_000

MOST_LITERAL = 64 * 2**10
"""Most characters of one literal."""

MOST_LITERALS = 4 * 2**20
"""Most characters of all literals, each counted as often as the SQL holds it."""

WIDEST = 16
"""Operands that one level of SQL joins: sqlite refuses trees of more than 1,000 levels."""

_COMPARISONS = {"$eq": "=", "$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}


@dataclass(frozen=True, slots=True)
class Sql:
    """A piece of SQL with the values of its placeholders."""

    text: str
    values: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Columns:
    """What the fields of a query are called in SQL.

    Args:
        plain: name of a field -> SQL expression.
        documents: name of a field -> column that holds JSON; `name.a.b` is a path into it.
        times: names in `plain` that hold microseconds; queries give them as seconds or as ISO 8601.
        rest: column that holds JSON in which every other name is a path; None: no other exists.
        indexed: name of a field -> table, and the expression in it that an index has.
    """

    plain: Mapping[str, str]
    documents: Mapping[str, str]
    times: frozenset[str] = frozenset()
    rest: str | None = None
    indexed: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def sql(self, name: str) -> Sql:
        """Return the SQL of a field.

        Raises:
            Refusal: no such field exists.
        """
        if "\0" in name:
            raise Refusal(422, "a field's name cannot hold the character NUL")
        if name in self.plain:
            return Sql(f"({self.plain[name]} / 1e6)" if name in self.times else self.plain[name])
        head, *path = _parts(name)
        if head not in self.documents and self.rest is not None:
            column, path = self.rest, [head, *path]
        elif head in self.documents:
            column = self.documents[head]
        else:
            known = ", ".join(sorted({*self.plain, *self.documents}))
            raise Refusal(422, f"the query names the field {name!r}, which does not exist", f"the fields are {known}")
        if not path:
            return Sql(column)
        paths = _json_paths(path)
        if len(paths) == 1:
            return Sql(f"json_extract({column}, ?)", (paths[0],))
        return Sql(f"COALESCE(json_extract({column}, ?), json_extract({column}, ?))", tuple(paths))


def condition(query: object, columns: Columns) -> Sql:
    """Return the condition of `{"$expr": ...}`.

    Raises:
        Refusal: an operator, an operand or a field is unknown; it is named.
    """
    if not isinstance(query, Mapping) or set(query) != {"$expr"}:
        raise Refusal(422, "a query must have the form {'$expr': {operator: operands}}")
    return _Compiler(columns).boolean(query["$expr"], 0)


def order(sort_by: object, columns: Columns, default: str) -> Sql:
    """Return what follows ORDER BY.

    Args:
        sort_by: weave's list of `{"field": name, "direction": "asc" | "desc"}`, or None.
        default: SQL that follows it, so that the order is complete.
    """
    if sort_by is None:
        return Sql(default)
    if not isinstance(sort_by, list) or len(sort_by) > DEEPEST:
        raise Refusal(422, f"sort_by must be a list of at most {DEEPEST} fields")
    parts: list[str] = []
    values: list[Any] = []
    for item in sort_by:
        given = item if isinstance(item, Mapping) else {}
        name, direction = given.get("field"), given.get("direction", "asc")
        if not isinstance(name, str) or direction not in ("asc", "desc"):
            raise Refusal(422, "each item of sort_by needs a field, and a direction asc or desc")
        sql = columns.sql(name)
        parts.append(f"{sql.text} {direction.upper()}")
        values += sql.values
    return Sql(", ".join([*parts, default]), tuple(values))


class _Compiler:
    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._operands = 0
        self._literals = 0

    def boolean(self, expression: object, depth: int) -> Sql:
        name, operands = self._operator(expression, depth)
        if name in ("$and", "$or"):
            parts = [self.boolean(operand, depth + 1) for operand in self._list(name, operands)]
            if not parts:
                return Sql("1" if name == "$and" else "0")
            return joined(name[1:].upper(), parts)
        if name == "$not":
            inner = self.boolean(self._list(name, operands, 1)[0], depth + 1)
            return Sql(f"(NOT {inner.text})", inner.values)
        if name in _COMPARISONS:
            left, right = self._list(name, operands, 2)
            return self._compare(_COMPARISONS[name], left, right, depth)
        if name == "$in":
            item, choices = self._list(name, operands, 2)
            return self._in(item, choices, depth)
        if name == "$contains":
            return self._contains(operands, depth)
        raise Refusal(422, f"the query's operator {name!r} is not supported", f"use one of {', '.join(_OPERATORS)}")

    def _compare(self, sign: str, left: object, right: object, depth: int) -> Sql:
        if sign == "=" and (_is_null(left) or _is_null(right)):
            side = self._value(right if _is_null(left) else left, None, depth)
            return Sql(f"({side.text} IS NULL)", side.values)
        kind = _kind(left) or _kind(right)
        time = self._is_time(left) or self._is_time(right)
        a, b = (self._value(side, kind, depth, time=time) for side in (left, right))
        found = Sql(f"COALESCE({a.text} {sign} {b.text}, 0)", a.values + b.values)
        if sign == "=" and kind is int:
            for field_side, number in ((left, right), (right, left)):
                if (candidates := self._candidates(field_side, number)) is not None:
                    return joined("AND", [candidates, found])
        return found

    def _candidates(self, operand: object, number: object) -> Sql | None:
        """Return what an index finds of a comparison of a field with a number; None if it has none.

        Found are the rows that hold the number, and all that hold a text, which may spell it.
        """
        name = operand.get("$getField") if isinstance(operand, Mapping) else None
        literal = number.get("$literal") if isinstance(number, Mapping) else None
        if literal is None or not isinstance(name, str) or name not in self._columns.indexed:
            return None
        table, column = self._columns.indexed[name]
        rows = f"SELECT rowid FROM {table} WHERE {column}"  # noqa: S608  # our names
        return Sql(f"{table}.rowid IN ({rows} = ? UNION ALL {rows} >= '')", (_literal(literal),))

    def _in(self, item: object, choices: object, depth: int) -> Sql:
        if not isinstance(choices, list):
            raise Refusal(422, "the second operand of $in must be a list")
        # The choices of one kind are one list: the item is compiled once for each kind.
        kinds: dict[type | None, list[Mapping[str, Any]]] = {}
        others = []
        for choice in self._list("$in", choices):
            if isinstance(choice, Mapping) and set(choice) == {"$literal"} and not _is_null(choice):
                kinds.setdefault(_kind(item) or _kind(choice), []).append(choice)
            else:
                others.append(choice)
        time = self._is_time(item)
        parts = []
        for kind, literals in kinds.items():
            left = self._value(item, kind, depth, time=time)
            values = tuple(value for one in literals for value in self._value(one, kind, depth, time=time).values)
            marks = ", ".join("?" * len(values))
            parts.append(Sql(f"COALESCE({left.text} IN ({marks}), 0)", left.values + values))
        parts += [self._compare("=", item, choice, depth) for choice in others]
        return joined("OR", parts) if parts else Sql("0")

    def _contains(self, operands: object, depth: int) -> Sql:
        if not isinstance(operands, Mapping) or not {"input", "substr"} <= set(operands):
            raise Refusal(422, "$contains needs input and substr")
        text, part = (self._value(operands[key], str, depth) for key in ("input", "substr"))
        fold = "lower" if operands.get("case_insensitive") else ""
        return Sql(f"(COALESCE(instr({fold}({text.text}), {fold}({part.text})), 0) > 0)", text.values + part.values)

    def _value(self, operand: object, kind: type | None, depth: int, *, time: bool = False) -> Sql:
        if not isinstance(operand, Mapping) or len(operand) != 1:
            raise Refusal(422, f"an operand must be $getField, $literal or $convert, not {_shown(operand)}")
        ((name, value),) = operand.items()
        if name == "$literal":
            if time and isinstance(value, str):
                return Sql("?", (time_of(value, "$literal") / 1e6,))
            literal = _literal(value)
            size = len(literal) if isinstance(literal, str) else 8
            self._literals += size
            if size > MOST_LITERAL or self._literals > MOST_LITERALS:
                raise Refusal(
                    422, f"a literal of the query is longer than {MOST_LITERAL} characters, or all than {MOST_LITERALS}"
                )
            return Sql("?", (literal,))
        if name == "$getField":
            if not isinstance(value, str):
                raise Refusal(422, "$getField must name a field")
            return _cast(self._columns.sql(value), None if time else kind)
        if name == "$convert":
            return self._convert(value, depth)
        if name in _OPERATORS:
            return self.boolean(operand, depth + 1)
        raise Refusal(422, f"the query's operand {name!r} is not supported")

    def _convert(self, value: object, depth: int) -> Sql:
        to = value.get("to") if isinstance(value, Mapping) else None
        if not isinstance(value, Mapping) or "input" not in value or not (isinstance(to, str) and to in _CONVERSIONS):
            raise Refusal(422, f"$convert needs input, and to: one of {', '.join(_CONVERSIONS)}")
        if depth > DEEPEST:
            raise Refusal(422, f"the query is nested deeper than {DEEPEST} levels")
        inner = self._value(value["input"], None, depth + 1)
        return Sql(_CONVERSIONS[to].format(inner.text), inner.values)

    def _is_time(self, operand: object) -> bool:
        name = operand.get("$getField") if isinstance(operand, Mapping) else None
        return isinstance(name, str) and name in self._columns.times

    def _operator(self, expression: object, depth: int) -> tuple[str, object]:
        if depth > DEEPEST:
            raise Refusal(422, f"the query is nested deeper than {DEEPEST} levels")
        if not isinstance(expression, Mapping) or len(expression) != 1:
            raise Refusal(422, f"an expression must have one operator, not {_shown(expression)}")
        ((name, operands),) = expression.items()
        return str(name), operands

    def _list(self, name: str, operands: object, count: int | None = None) -> list[Any]:
        if not isinstance(operands, list) or (count is not None and len(operands) != count):
            raise Refusal(422, f"{name} needs a list of {count or 'its'} operands")
        self._operands += len(operands)
        if self._operands > MOST_OPERANDS:
            raise Refusal(422, f"the query has more than {MOST_OPERANDS} operands")
        return operands


_OPERATORS = ("$and", "$or", "$not", *_COMPARISONS, "$in", "$contains")

_CONVERSIONS = {
    "double": "as_number({})",
    "int": "CAST(as_number({}) AS INTEGER)",
    "string": "as_text({})",
    "bool": "(COALESCE(as_number({}), 0) != 0)",
    "exists": "({} IS NOT NULL)",
}

_CASTS: Mapping[type, Callable[[str], str]] = {int: "as_number({})".format, str: "as_text({})".format}


def _cast(sql: Sql, kind: type | None) -> Sql:
    return Sql(_CASTS[kind](sql.text), sql.values) if kind is not None else sql


def _kind(operand: object) -> type | None:
    """Return how the other side of a literal is read: as a number, as a text, or as it is."""
    value = operand.get("$literal") if isinstance(operand, Mapping) else None
    if isinstance(value, bool):
        return None
    return int if isinstance(value, int | float) else str if isinstance(value, str) else None


def _is_null(operand: object) -> bool:
    return isinstance(operand, Mapping) and "$literal" in operand and operand["$literal"] is None


def _literal(value: object) -> object:
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return float(value)
    if value is None or isinstance(value, str | int | float):
        return value
    return json.dumps(value, separators=(",", ":"))  # as json_extract returns a list or an object


def joined(word: str, parts: list[Sql]) -> Sql:
    """Return parts, at least one, with `AND` or `OR` between them, as a tree of few levels."""
    while len(parts) > WIDEST:
        parts = [joined(word, parts[start : start + WIDEST]) for start in range(0, len(parts), WIDEST)]
    text = f" {word} ".join(part.text for part in parts)
    return Sql(f"({text})", tuple(value for part in parts for value in part.values))


def _parts(name: str) -> list[str]:
    """Split a dotted name; a backslash keeps the dot after it."""
    return [part.replace("\\.", ".") for part in re.split(r"(?<!\\)\.", name)]


def _json_paths(path: list[str]) -> list[str]:
    """Return the JSON path of a field; two where a number may be a key or the index of a list."""
    if any('"' in part for part in path):
        raise Refusal(422, "a field's name cannot hold a quotation mark")
    keys = "$" + "".join(f'."{part}"' for part in path)
    indexed = "$" + "".join(f"[{part}]" if re.fullmatch(r"\d{1,9}", part) else f'."{part}"' for part in path)
    return [keys] if keys == indexed else [keys, indexed]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
