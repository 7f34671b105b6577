"""Arguments of calls: what has one meaning is converted and counted, the rest is explained."""

from __future__ import annotations

from typing import Any

import pytest

from agentloop.tool.arguments import read_arguments

POINT = {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "number"}}, "required": ["x"]}
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "n": {"type": "integer"},
        "r": {"type": "number"},
        "on": {"type": "boolean"},
        "text": {"type": "string"},
        "many": {"type": "array", "items": {"type": "integer"}},
        "at": {"$ref": "#/$defs/point"},
        "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "either": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
        "level": {"enum": [1, 2, 3]},
        "tree": {"$ref": "#/$defs/node"},
        "fixed": {"const": 7},
        "any": {},
        "names": {"type": "object", "additionalProperties": {"type": "number"}},
        "by": {"type": "array", "items": {"type": "object", "patternProperties": {"^n_": {"type": "integer"}}}},
        "closed": {"type": "object", "properties": {"x": {"type": "integer"}}, "additionalProperties": False},
    },
    "$defs": {
        "point": POINT,
        "node": {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#/$defs/node"}}}},
        "loop": {"$ref": "#/$defs/loop"},
    },
}


def schema(**properties: Any) -> dict[str, Any]:
    parameters = {**PARAMETERS, "properties": {**PARAMETERS["properties"], **properties}}
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


@pytest.mark.parametrize(
    ("given", "meant", "converted"),
    [
        ({"n": 3}, {"n": 3}, 0),
        ({"n": "3"}, {"n": 3}, 1),
        ({"n": " -3 "}, {"n": -3}, 1),
        ({"n": "3.0"}, {"n": 3}, 1),
        ({"n": 3.0}, {"n": 3}, 1),
        ({"r": "2.5e3"}, {"r": 2500.0}, 1),
        ({"r": "7"}, {"r": 7}, 1),
        ({"on": "true"}, {"on": True}, 1),
        ({"on": "False"}, {"on": False}, 1),
        ({"text": "3"}, {"text": "3"}, 0),
        ({"many": "[1, 2]"}, {"many": [1, 2]}, 1),
        ({"many": ["1", 2, "3"]}, {"many": [1, 2, 3]}, 2),
        ({"at": '{"x": "4", "y": 1}'}, {"at": {"x": 4, "y": 1}}, 2),
        ({"at": {"x": 1, "other": "z"}}, {"at": {"x": 1, "other": "z"}}, 0),
        ({"maybe": None}, {"maybe": None}, 0),
        ({"maybe": "null"}, {"maybe": None}, 1),
        ({"maybe": "12"}, {"maybe": 12}, 1),
        ({"either": "12"}, {"either": "12"}, 0),
        ({"level": "2"}, {"level": 2}, 1),
        ({"fixed": 7}, {"fixed": 7}, 0),
        ({"tree": {"children": [{"children": []}]}}, {"tree": {"children": [{"children": []}]}}, 0),
        ({"any": "3"}, {"any": "3"}, 0),
        ({"n": '"3"'}, {"n": 3}, 1),
        ({"on": ' "true" '}, {"on": True}, 1),
        ({"many": '"[1, 2]"'}, {"many": [1, 2]}, 1),
        ({"many": ["1", '"2"']}, {"many": [1, 2]}, 2),
        ({"at": '"{\\"x\\": 4}"'}, {"at": {"x": 4}}, 1),
        ({"at": '{"x": "\\"4\\""}'}, {"at": {"x": 4}}, 2),
        ({"names": {"a": "1.5", "b": 2}}, {"names": {"a": 1.5, "b": 2}}, 1),
        ({"names": '{"a": "1"}'}, {"names": {"a": 1}}, 2),
        ({"by": [{"n_a": "3", "b": "3"}]}, {"by": [{"n_a": 3, "b": "3"}]}, 1),
        ({"closed": {"x": "1"}}, {"closed": {"x": 1}}, 1),
        ({"text": '"quoted"'}, {"text": '"quoted"'}, 0),
    ],
)
def test_text_becomes_what_the_schema_takes(given: dict[str, Any], meant: dict[str, Any], converted: int) -> None:
    read = read_arguments(schema(), given)
    assert (read.fault, read.values, read.converted) == (None, meant, converted)
    assert [type(value) for value in read.values.values()] == [type(value) for value in meant.values()]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"n": '"three"'}, "the argument 'n' of f has to be of type integer"),
        ({"n": '"3'}, "has to be of type integer"),
        ({"n": '"3" 4'}, "has to be of type integer"),
        ({"n": '"\\"3\\""'}, "has to be of type integer"),
        ({"n": "three"}, "the argument 'n' of f has to be of type integer"),
        ({"n": "3.5"}, "has to be of type integer"),
        ({"n": "9" * 30}, "has to be of type integer"),
        ({"n": "1e999"}, "has to be of type integer"),
        ({"r": "nan"}, "has to be of type number"),
        ({"r": "1e999"}, "has to be of type number"),
        ({"n": True}, "has to be of type integer"),
        ({"n": "٣"}, "has to be of type integer"),
        ({"on": 1}, "has to be of type boolean"),
        ({"many": "[1, 2"}, "has to be of type array"),
        ({"many": ["a"]}, "the argument 'many[0]' of f has to be of type integer"),
        ({"at": {"y": 1}}, "the argument 'at' of f needs 'x'"),
        ({"at": {"x": "?"}}, "the argument 'at.x' of f has to be of type integer"),
        ({"names": {"a": "x"}}, "the argument 'names.a' of f has to be of type number"),
        ({"names": {"a": [1]}}, "the argument 'names.a' of f has to be of type number"),
        ({"by": [{"n_a": "x"}]}, "the argument 'by[0].n_a' of f has to be of type integer"),
        ({"closed": {"y": 1}}, "the argument 'closed' of f has no 'y'; it takes: x"),
        ({"maybe": "x"}, "has to be of type integer or null"),
        ({"level": True}, "has to be one of [1, 2, 3]"),
        ({"level": "4"}, "has to be one of"),
        ({"fixed": 8}, "has to be one of [7]"),
        ({"other": 1}, "f has no argument 'other'; its arguments are: n, r"),
    ],
)
def test_what_has_no_meaning_is_explained_to_the_model(given: dict[str, Any], says: str) -> None:
    read = read_arguments(schema(), given)
    assert read.fault is not None and says in read.fault and read.values == given


def test_an_argument_under_another_name_is_named_with_the_one_that_is_missing() -> None:
    needs = {
        "function": {"name": "f", "parameters": {"properties": {"side": {"type": "integer"}}, "required": ["side"]}}
    }
    assert read_arguments(needs, {"size": 64}).fault == (
        "f needs the argument 'side' and has no argument 'size'; its arguments are: side"
    )
    assert read_arguments(needs, {}).fault == "f needs the argument 'side'"


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("text", 'has to be of type array: write ["text"]'),
        (3, "has to be of type array"),
        ("[1, 2", "has to be of type array"),
        ("x" * 300, "has to be of type array: write it in [ and ]"),
    ],
)
def test_a_single_item_is_shown_as_the_list_that_is_wanted(value: Any, says: str) -> None:
    wants = {
        "function": {"name": "f", "parameters": {"properties": {"q": {"type": "array", "items": {"type": "string"}}}}}
    }
    fault = read_arguments(wants, {"q": value}).fault
    assert fault is not None and fault.endswith(says)


def test_schemas_that_refer_to_themselves_or_fan_out_take_any_value() -> None:
    loop = schema(loop={"$ref": "#/$defs/loop"}, none={"$ref": "#/$defs/missing/0"}, far={"$ref": "http://x/y"})
    assert read_arguments(loop, {"loop": 1, "none": 2, "far": 3}).fault is None
    bomb = {f"b{i}": {"anyOf": [{"$ref": f"#/$defs/b{i + 1}"}] * 9} for i in range(40)}
    found = {"function": {"name": "f", "parameters": {"properties": {"x": {"$ref": "#/$defs/b0"}}, "$defs": bomb}}}
    assert read_arguments(found, {"x": 1}).fault is None


def test_the_root_of_a_schema_may_be_a_reference() -> None:
    found = {"function": {"name": "f", "parameters": {"$ref": "#/$defs/point", "$defs": {"point": POINT}}}}
    assert read_arguments(found, {"x": "1"}).values == {"x": 1}
    assert read_arguments(found, {}).fault == "f needs the argument 'x'"


def test_arguments_that_are_not_listed_are_allowed_where_the_schema_says_so() -> None:
    for more in (True, {}, {"type": "integer"}):
        found = {"function": {"name": "f", "parameters": {"properties": {}, "additionalProperties": more}}}
        assert read_arguments(found, {"z": 1}).values == {"z": 1}
    assert read_arguments(found, {"z": "1"}).values == {"z": 1}
    assert read_arguments(found, {"z": "one"}).fault == "the argument 'z' of f has to be of type integer"
    assert read_arguments({"function": {"name": "f"}}, {"z": 1}).fault == "f has no argument 'z'; it takes no arguments"
