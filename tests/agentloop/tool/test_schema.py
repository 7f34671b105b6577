"""Schemas of tools: what pydantic writes is read as meant, the rest is refused with its place."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from agentloop.errors import ToolConfigError
from agentloop.tool.arguments import argument_fault
from agentloop.tool.function import function_schema
from agentloop.tool.schema import read_schema


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
