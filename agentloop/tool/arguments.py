"""Check the arguments of a call against the tool's schema, and convert what a model wrote as text.

Models write `"3"` for 3 and `"[1, 2]"` for a list, some of them with further quotes within. Where
the schema takes no text, such a value has one meaning only: it is converted and counted. Everything
else that does not fit is explained to the model. The sampled tokens and the conversation stay as
they are.

A schema may refer to its own definitions (`$ref`), offer alternatives (`anyOf`, `oneOf`) and nest.
References are followed one step for each level of the value, so a schema that contains itself ends
with the value.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agentloop.chat.call_json import DEEPEST, CallError, read_json

JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}

MOST_ALTERNATIVES = 64
"""Alternatives of one value, and references in a row, that are followed; beyond, anything fits."""

LONGEST_NUMBER = 40
LONGEST_EXAMPLE = 200
"""Characters of a value that a message shows in brackets."""

LONGEST_CHOICES = 2_000
"""Characters of the choices that a message lists."""

_INTEGER = re.compile(r"[+-]?[0-9]+(?:\.0+)?")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_CONSTANTS = {
    "true": True, "True": True, "false": False, "False": False, "null": None, "None": None,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ReadArguments:
    """A call's arguments as the tool gets them.

    Attributes:
        values: the arguments; those that were given, if there is a fault.
        converted: how many values were converted from text.
        fault: what is wrong, in words for the model; None: nothing.
    """

    values: dict[str, Any]
    converted: int = 0
    fault: str | None = None


def read_arguments(schema: dict[str, Any], arguments: dict[str, Any]) -> ReadArguments:
    """Check and convert the arguments of a call.

    Args:
        schema: the tool's, `{"type": "function", "function": {"name": .., "parameters": ..}}`.
        arguments: as the model wrote them; not changed.
    """
    root = schema["function"].get("parameters") or {}
    name = schema["function"]["name"]
    parameters = _followed(root, root)
    properties = parameters.get("properties") or {}
    missing = [key for key in parameters.get("required") or () if key not in arguments]
    if missing:
        fault = f"{name} needs the argument {missing[0]!r}"
        unknown = [] if _takes_more(parameters) else [key for key in arguments if key not in properties]
        if unknown:  # likely the same argument under another name
            fault += f" and has no argument {unknown[0]!r}; its arguments are: {', '.join(properties)}"
        return ReadArguments(arguments, fault=fault)

    values, converted = {}, 0
    for key, value in arguments.items():
        given = properties[key] if key in properties else _further(parameters, key)
        if key not in properties and not _takes_more(parameters):
            known = f"its arguments are: {', '.join(properties)}" if properties else "it takes no arguments"
            return ReadArguments(arguments, fault=f"{name} has no argument {key!r}; {known}")
        reading = _Reading(root)
        try:
            values[key] = reading.read(given, value, 0)
        except _Misfit as exc:
            return ReadArguments(arguments, fault=f"the argument {key + exc.place!r} of {name} {exc.reason}")
        converted += reading.converted
    return ReadArguments(values, converted)


def argument_fault(schema: dict[str, Any], arguments: dict[str, Any]) -> str | None:
    """Check a call's arguments; return the fault in words for the model, or None."""
    return read_arguments(schema, arguments).fault


class _Misfit(Exception):
    def __init__(self, reason: str, place: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.place = place


class _Reading:
    """Reads one argument; counts what it converts."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self.converted = 0

    def read(self, schema: Any, value: Any, depth: int) -> Any:
        if depth > DEEPEST:
            return value
        alternatives = _alternatives(self._root, schema)
        if alternatives is None:  # any value fits
            return value

        fitting = [each for each in alternatives if _is_of(value, _types(each))]
        if not fitting:
            value = self._converted(alternatives, value)
            fitting = [each for each in alternatives if _is_of(value, _types(each))]

        # With several fitting alternatives, what is inside belongs to none for sure.
        if len(fitting) == 1:
            value = self._inside(fitting[0], value, depth)
        choices = [_choices(each) for each in fitting]
        if all(each is not None for each in choices):
            value = self._chosen([choice for each in choices for choice in each or ()], value)
        return value

    def _converted(self, alternatives: list[Mapping[str, Any]], value: Any) -> Any:
        names = list(dict.fromkeys(name for each in alternatives for name in _types(each) or ()))
        for name in names:
            try:
                found = _convert(name, value)
            except ValueError:
                continue
            self.converted += 1
            return found
        raise _Misfit(f"has to be of type {' or '.join(names)}{self._in_list(alternatives, value)}")

    def _in_list(self, alternatives: list[Mapping[str, Any]], value: Any) -> str:
        """Return how to write a value that is an item of the list that is wanted; else nothing."""
        for each in alternatives:
            items = _alternatives(self._root, each.get("items") or {})
            fits = items is None or any(_is_of(value, _types(item)) for item in items)
            if "array" in (_types(each) or ()) and fits and str(value)[:1] != "[":
                shown = json.dumps([value], ensure_ascii=False)
                return f": write {shown}" if len(shown) <= LONGEST_EXAMPLE else ": write it in [ and ]"
        return ""

    def _inside(self, schema: Mapping[str, Any], value: Any, depth: int) -> Any:
        """Read the items of a list, or the properties of an object."""
        if isinstance(value, list) and isinstance(schema.get("items"), dict):
            return [self._at(f"[{place}]", schema["items"], item, depth) for place, item in enumerate(value)]
        if isinstance(value, dict):
            properties = schema.get("properties")
            properties = properties if isinstance(properties, dict) else {}
            missing = [key for key in _names(schema.get("required")) if key not in value]
            if missing:
                raise _Misfit(f"needs {missing[0]!r}")
            unknown = [key for key in value if key not in properties and _further(schema, key) is False]
            if unknown:
                known = f"; it takes: {', '.join(properties)}" if properties else ""
                raise _Misfit(f"has no {unknown[0]!r}{known}")
            return {
                key: self._at(f".{key}", properties[key] if key in properties else _further(schema, key), item, depth)
                for key, item in value.items()
            }
        return value

    def _at(self, place: str, schema: Any, value: Any, depth: int) -> Any:
        try:
            return self.read(schema, value, depth + 1)
        except _Misfit as exc:
            raise _Misfit(exc.reason, place + exc.place) from None

    def _chosen(self, choices: list[Any], value: Any) -> Any:
        if any(_equal(choice, value) for choice in choices):
            return value
        if isinstance(value, str):  # an enum of numbers needs no type
            for name in ("integer", "number", "boolean"):
                try:
                    found = _convert(name, value)
                except ValueError:
                    continue
                if any(_equal(choice, found) for choice in choices):
                    self.converted += 1
                    return found
        shown = str(choices)
        raise _Misfit(f"has to be one of {shown if len(shown) <= LONGEST_CHOICES else shown[:LONGEST_CHOICES] + '...'}")


def _convert(name: str, value: Any) -> Any:
    """Return what a text means as JSON of a type.

    Raises:
        ValueError: it means nothing of that type.
    """
    if name == "integer" and isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)  # in JSON schema, 3.0 is an integer
    if not isinstance(value, str):
        raise ValueError
    text = _unquoted(value.strip())
    if name in ("integer", "number"):
        if len(text) > LONGEST_NUMBER or not (_INTEGER if name == "integer" else _NUMBER).fullmatch(text):
            raise ValueError
        if _INTEGER.fullmatch(text):
            whole = int(text.partition(".")[0])
            if not -(2**63) <= whole < 2**63:
                raise ValueError
            return whole
        number = float(text)
        if not math.isfinite(number):
            raise ValueError
        return number
    if name in ("boolean", "null"):
        if text not in _CONSTANTS or (_CONSTANTS[text] is None) != (name == "null"):
            raise ValueError
        return _CONSTANTS[text]
    if name in ("array", "object") and text[:1] == ("[" if name == "array" else "{"):
        try:
            found, end = read_json(text, 0)
        except CallError as exc:
            raise ValueError from exc
        if text[end:].strip():
            raise ValueError
        return found
    raise ValueError


def _unquoted(text: str) -> str:
    """Return what a JSON string within a text says; any other text as it is."""
    if text[:1] != '"':
        return text
    try:
        found, end = read_json(text, 0)
    except CallError:
        return text
    return found.strip() if isinstance(found, str) and not text[end:].strip() else text


def _alternatives(root: Mapping[str, Any], schema: Any) -> list[Mapping[str, Any]] | None:
    """Return the schemas of which a value has to fit one; None: any value fits."""
    found: list[Mapping[str, Any]] = []
    left, seen = [schema], 0
    while left:
        seen += 1
        each = _followed(root, left.pop(0))
        if seen > MOST_ALTERNATIVES:
            return None
        options = each.get("anyOf") or each.get("oneOf")
        if isinstance(options, list) and not _types(each):
            left += options
        elif not _types(each) and _choices(each) is None:
            return None
        else:
            found.append(each)
    return found


def _followed(root: Mapping[str, Any], schema: Any) -> Mapping[str, Any]:
    """Return a schema, or the one that its `$ref` names; an empty one if there is none."""
    for _ in range(MOST_ALTERNATIVES):
        if not isinstance(schema, Mapping):
            return {}
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            return schema
        schema = find_reference(root, reference)
    return {}


def find_reference(root: Mapping[str, Any], reference: str) -> Any:
    """Return what a reference within a schema (`#/$defs/Point`) names; None: nothing."""
    if not reference.startswith("#"):
        return None
    node: Any = root
    for part in reference[1:].split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, list) and key.isdecimal() and len(key) < 6 and int(key) < len(node):
            node = node[int(key)]
        elif isinstance(node, Mapping):
            node = node.get(key)
        else:
            return None
    return node


def _further(schema: Mapping[str, Any], key: str) -> Any:
    """Return the schema of a value that is not among the properties; false: there must be none."""
    patterns = schema.get("patternProperties")
    for pattern, each in patterns.items() if isinstance(patterns, Mapping) else ():
        try:
            if re.search(pattern, key):
                return each
        except (re.error, TypeError):  # other dialects of patterns; it may fit
            return {}
    return schema.get("additionalProperties", {})


def _takes_more(parameters: Mapping[str, Any]) -> bool:
    """Whether arguments may be given that are not among the properties.

    JSON schema would allow them if it says nothing; for a model, an argument that nobody reads is a
    mistake.
    """
    more = parameters.get("additionalProperties")
    return isinstance(more, dict) or bool(more) or bool(parameters.get("patternProperties"))


def _types(schema: Mapping[str, Any]) -> list[str]:
    wanted = schema.get("type")
    names = [wanted] if isinstance(wanted, str) else wanted if isinstance(wanted, list) else []
    return [name for name in names if name in JSON_TYPES]


def _choices(schema: Mapping[str, Any]) -> list[Any] | None:
    if isinstance(schema.get("enum"), list):
        return list(schema["enum"])
    return [schema["const"]] if "const" in schema else None


def _is_of(value: Any, names: list[str]) -> bool:
    if not names:
        return True
    allowed = tuple(kind for name in names for kind in JSON_TYPES[name])
    return isinstance(value, allowed) and (not isinstance(value, bool) or bool in allowed)


def _equal(choice: Any, value: Any) -> bool:
    return bool(choice == value) and isinstance(choice, bool) == isinstance(value, bool)


def _names(required: Any) -> list[str]:
    return [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
