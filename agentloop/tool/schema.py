"""Read the schema of a tool: what pydantic wrote is read as what was meant, the rest is refused."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from agentloop.errors import ToolConfigError
from agentloop.text import clean
from agentloop.tool.arguments import JSON_TYPES

NULL_MEANS_NULL = ("default", "const")
"""Keys for which null is a value. Elsewhere it stands for an unset field, as pydantic writes it."""

DEEPEST = 64
MOST_VALUES = 10_000
"""Levels and values of a schema at most."""

SCHEMA_MAPS = ("properties", "$defs", "definitions", "patternProperties")
"""Keys whose values are schemas by name."""

INNER = ("items", "additionalProperties", "not", "contains", "propertyNames", "if", "then", "else")
INNER_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
"""Keys whose value is a schema, or a list of schemas."""

FUNCTION_WORDS = ("name", "description", "parameters", "strict", "return", "response", "title")
WORDS = (
    *SCHEMA_MAPS, *INNER, *INNER_LISTS, "type", "enum", "const", "default", "description", "title", "required",
    "format", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength",
    "maxLength", "minItems", "maxItems", "uniqueItems", "minContains", "maxContains", "minProperties", "maxProperties",
    "dependentRequired", "dependentSchemas", "dependencies", "additionalItems", "unevaluatedItems",
    "unevaluatedProperties", "contentEncoding", "contentMediaType", "contentSchema", "example", "examples",
    "nullable", "optional", "deprecated", "readOnly", "writeOnly", "discriminator", "propertyOrdering", "id", "choices",
)  # fmt: skip
"""Keywords of JSON schema, and a few that services add."""

OTHER_TYPES = {
    "list": "array", "tuple": "array", "set": "array", "dict": "object", "map": "object", "str": "string",
    "text": "string", "float": "number", "double": "number", "int": "integer", "long": "integer", "bool": "boolean",
    "none": "null", "nonetype": "null",
}  # fmt: skip
"""Names that languages have for the types of JSON schema."""


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


def check_words(schema: dict[str, Any], where: str, *, keys: bool = True) -> None:
    """Refuse a schema with a type that does not exist, or with a misspelt keyword, at any depth.

    A model would read it, and calls would not be checked by it. For schemas that the user writes:
    those of servers and of data sets are read as they are.

    Args:
        schema: as `read_schema` returns it.
        where: its place, for messages.
        keys: check the keywords too.

    Raises:
        ToolConfigError: names the place, the word and the nearest right one.
    """
    function = schema["function"]
    where = f"{where}, {function['name']}"
    if keys:
        _check_keys(function, FUNCTION_WORDS, where)
    left: list[tuple[str, Any]] = [(f"{where}: parameters", function.get("parameters"))]
    while left:
        place, node = left.pop()
        if not isinstance(node, dict):
            continue
        if keys:
            _check_keys(node, WORDS, place)
        kinds = node.get("type", [])
        for kind in [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else ():
            if kind not in JSON_TYPES:
                near = OTHER_TYPES.get(str(kind).lower()) or next(
                    iter(get_close_matches(str(kind), JSON_TYPES, 1)), None
                )
                raise ToolConfigError(
                    f"{place} has the type {clean(repr(kind), 100)}",
                    (f"did you mean {near}? " if near else "") + f"the types are: {', '.join(JSON_TYPES)}",
                )
        for key in SCHEMA_MAPS:
            if isinstance(node.get(key), dict):
                left += [(f"{place}, {name!r}", each) for name, each in node[key].items()]
        left += [(f"{place}, {key}", node[key]) for key in INNER if key in node]
        for key in INNER_LISTS:
            if isinstance(node.get(key), list):
                left += [(f"{place}, {key}[{number}]", each) for number, each in enumerate(node[key])]


def _check_keys(node: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    """Refuse a key that is nearly a keyword; others are annotations, which JSON schema allows."""
    for key in node:
        near = get_close_matches(str(key), known, 1, 0.8)
        if key not in known and near and near[0] not in node:
            raise ToolConfigError(f"{where} has the unknown key {clean(repr(key), 100)}", f"did you mean {near[0]!r}?")


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
