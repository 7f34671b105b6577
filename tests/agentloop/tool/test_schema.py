"""Schemas of tools: what pydantic writes is read as meant, the rest is refused with its place."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from agentloop.errors import ToolConfigError
from agentloop.tool.arguments import argument_fault
from agentloop.tool.function import function_schema
from agentloop.tool.schema import check_words, read_schema


def schema(parameters: Any, **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters, **function}, "strict": None}


def test_nulls_of_unset_fields_are_left_out() -> None:
    x = {"type": "string", "enum": None, "description": None, "default": None, "items": {"enum": ["a", None]}}
    found = read_schema(schema({"type": "object", "properties": {"x": x}, "required": None}, description=None), "here")
    assert found == {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "string", "default": None, "items": {"enum": ["a", None]}}},
            },
        },
    }
    assert argument_fault(found, {"x": "b"}) is None and argument_fault(found, {}) is None
    assert "parameters" not in read_schema(schema(None), "here")["function"]


def test_a_property_without_a_schema_takes_any_value() -> None:
    found = read_schema(schema({"properties": {"enum": True, "default": None}}), "here")
    assert found["function"]["parameters"]["properties"] == {"enum": {}, "default": {}}
    assert argument_fault(found, {"enum": 1, "default": [2]}) is None


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (3, "here has no function with a name"),
        ({"function": {"name": 3}}, "here has no function with a name"),
        (schema([1]), "here, f: parameters is a list, not an object"),
        (schema("x"), "parameters is text"),
        (schema(True), "parameters is a boolean"),
        (schema({"properties": ["x"]}), "properties is a list"),
        (schema({"properties": {"x": False}}), "property 'x' is a boolean, not a schema"),
        (schema({"properties": {"x": {"type": 3}}}), "property 'x' has the type 3"),
        (schema({"properties": {"x": {"enum": "a"}}}), "property 'x' has an enum that is not a list"),
        (schema({"properties": {"x": {}}, "required": "x"}), "required is not a list of names"),
        (schema({"properties": {"x": {}}, "required": [1]}), "required is not a list of names"),
        (schema({"properties": {"x": {}}, "required": ["y"]}), "required names 'y', which is not among"),
    ],
)
def test_a_wrong_schema_is_refused_with_its_place(value: Any, says: str) -> None:
    with pytest.raises(ToolConfigError) as caught:
        read_schema(value, "here")
    assert says in str(caught.value) and caught.value.hint


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"properties": {"x": {"type": "list"}}}, "f: parameters, 'x' has the type 'list'\n  fix: did you mean array?"),
        ({"properties": {"x": {"type": ["strng", "null"]}}}, "has the type 'strng'\n  fix: did you mean string?"),
        (
            {"properties": {"x": {"type": "frob"}}},
            "fix: the types are: string, number, integer, boolean, array, object",
        ),
        ({"type": "dict", "properties": {}}, "f: parameters has the type 'dict'\n  fix: did you mean object?"),
        (
            {"properties": {"x": {"type": "array", "item": {"type": "strng"}}}},
            "parameters, 'x' has the unknown key 'item'\n  fix: did you mean 'items'?",
        ),
        ({"properties": {"x": {"type": "array", "items": {"type": "strng"}}}}, "parameters, 'x', items has the type"),
        ({"properties": {"x": {"anyOf": [{"type": "int"}]}}}, "'x', anyOf[0] has the type 'int'"),
        ({"properties": {"x": {"additionalProperties": {"type": "float"}}}}, "did you mean number?"),
        ({"properties": {}, "$defs": {"p": {"propertis": {}}}}, "parameters, 'p' has the unknown key 'propertis'"),
        ({"properties": {}, "requierd": []}, "did you mean 'required'?"),
    ],
)
def test_types_and_keywords_that_do_not_exist_are_refused_with_the_nearest_ones(parameters: Any, says: str) -> None:
    with pytest.raises(ToolConfigError) as caught:
        check_words(read_schema(schema(parameters), "here"), "here")
    assert says in str(caught.value)


def test_a_misspelt_key_of_the_function_is_refused() -> None:
    with pytest.raises(ToolConfigError, match="here, f has the unknown key 'descripton'"):
        check_words(read_schema(schema(None, descripton="x"), "here"), "here")


def test_annotations_and_names_are_no_keywords() -> None:
    properties = {"item": {"type": "string", "default": {"type": "list"}, "x-order": 1}, "typ": {"examples": [1]}}
    check_words(read_schema(schema({"type": "object", "properties": properties}), "here"), "here")


def test_a_schema_made_in_python_with_nulls_does_not_fail_a_call() -> None:
    made = schema({"properties": {"x": {"type": None, "enum": None}, "y": True}, "required": None})
    assert argument_fault(made, {"x": 1, "y": 2}) is None


def test_the_schema_of_a_function_imports_no_torch_and_knows_its_tensors() -> None:
    code = (
        "import sys\nfrom agentloop.tool.function import function_schema\n"
        "def f(x: str, y: dict[str, list[int]]) -> str:\n"
        "    'F.\\n\\n    Args:\\n        x: One.\\n        y: Two.\\n    '\n"
        "print(function_schema(f)['function']['parameters']['required'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['x', 'y'] False"

    import torch

    def f(sound: torch.Tensor) -> str:
        """F.

        Args:
            sound: One.
        """
        return str(sound)

    f.__annotations__ = {"sound": torch.Tensor, "return": str}  # the name is not one of the module
    assert function_schema(f)["function"]["parameters"]["properties"]["sound"]["type"] == "audio"
