"""Read the schema of a tool: what pydantic wrote is read as what was meant, the rest is refused."""

from __future__ import annotations

from typing import Any

from agentloop.errors import ToolConfigError

NULL_MEANS_NULL = ("default", "const")
"""Keys for which null is a value. Elsewhere it stands for an unset field, as pydantic writes it."""

DEEPEST = 64
MOST_VALUES = 10_000
"""Levels and values of a schema at most."""

SCHEMA_MAPS = ("properties", "$defs", "definitions", "patternProperties")
"""Keys whose values are schemas by name."""


def read_schema(schema: Any, where: str) -> dict[str, Any]:
    """Return a schema `{type: function, function: {name, description, parameters}}` in plain form.

    Nulls of unset fields are left out. A property whose schema is `true` or null takes any value.

    Args:
        where: place of the schema, for messages.

    Raises:
        ToolConfigError: a part has the wrong form; it is named.
    """
    function = schema.get("function") if isinstance(schema, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ToolConfigError(
            f"{where} has no function with a name", "write {type: function, function: {name, description, parameters}}"
        )

    _check_size(schema, f"{where}, {function['name'][:80]}")
    found: dict[str, Any] = _without_nulls(schema)
    function = found["function"]
    where = f"{where}, {function['name']}"
    if "parameters" in function:
        function["parameters"] = _parameters(function["parameters"], where)
    return found


def _check_size(schema: Any, where: str) -> None:
    """Refuse a schema that no prompt could hold, without recursion."""
    count, level, depth = 0, [schema], 0
    while level:
        depth += 1
        count += len(level)
        if depth > DEEPEST or count > MOST_VALUES:
            raise ToolConfigError(
                f"{where}: the schema has more than {DEEPEST} levels, or more than {MOST_VALUES:,} values",
                "shorten it: all of it is in every prompt",
            )
        inner = [node for node in level if isinstance(node, (dict, list))]
        level = [child for node in inner for child in (node.values() if isinstance(node, dict) else node)]


def _parameters(parameters: Any, where: str) -> dict[str, Any]:
    if not isinstance(parameters, dict):
        raise ToolConfigError(
            f"{where}: parameters is {_kind(parameters)}, not an object",
            "write parameters: {type: object, properties: {name: {type: string}}, required: [name]}",
        )
    properties = parameters.get("properties", {})
    if not isinstance(properties, dict):
        raise ToolConfigError(
            f"{where}: properties is {_kind(properties)}, not an object", "write properties: {name: {type: string}}"
        )
    for name, schema in properties.items():
        _check_property(schema, f"{where}: property {name!r}")

    required = parameters.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise ToolConfigError(f"{where}: required is not a list of names", "write required: [name]")
    unknown = [name for name in required if name not in properties]
    if unknown and not parameters.get("additionalProperties"):
        raise ToolConfigError(
            f"{where}: required names {unknown[0]!r}, which is not among the properties",
            "add it to properties, or remove it: no call could satisfy this schema",
        )
    return parameters


def _check_property(schema: Any, where: str) -> None:
    if not isinstance(schema, dict):
        raise ToolConfigError(f"{where} is {_kind(schema)}, not a schema", "write {type: string}, or leave it out")
    kind = schema.get("type", [])
    if not (isinstance(kind, str) or (isinstance(kind, list) and all(isinstance(name, str) for name in kind))):
        raise ToolConfigError(f"{where} has the type {kind!r}", "write type: string, or a list of types")
    if not isinstance(schema.get("enum", []), list):
        raise ToolConfigError(f"{where} has an enum that is not a list", "write enum: [a, b]")


def _without_nulls(node: Any, *, named: bool = False) -> Any:
    """Return a node without nulls of unset fields; `named`: its keys are names, not keywords."""
    if isinstance(node, list):
        return [_without_nulls(item) for item in node]
    if not isinstance(node, dict):
        return node
    if named:
        return {name: {} if item is None or item is True else _without_nulls(item) for name, item in node.items()}
    return {
        key: _without_nulls(item, named=key in SCHEMA_MAPS)
        for key, item in node.items()
        if item is not None or key in NULL_MEANS_NULL
    }


def _kind(value: Any) -> str:
    names = {list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
