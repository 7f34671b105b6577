"""What a plain function returns, as the text that the model reads."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from agentloop.errors import ToolError
from agentloop.tool.function import FunctionTool
from agentloop.types import result_text


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ("12", "12"),
        (None, ""),
        (12, "12"),
        (1.5, "1.5"),
        (True, "True"),
        (Decimal("1.50"), "1.50"),
        (Path("a"), "a"),
        ({"a": [1, "ü", None]}, '{"a": [1, "ü", null]}'),
        ((1, 2), "[1, 2]"),
    ],
)
def test_a_result_has_one_text(result: Any, text: str) -> None:
    assert result_text(result) == text


def test_an_image_is_answered_with_what_to_return_instead() -> None:
    with pytest.raises(
        TypeError, match=r"it returned Image: for an image, return ToolResult\(text, images=\[image\]\)"
    ):
        result_text(Image.new("RGB", (2, 2)))


@pytest.mark.parametrize("result", [b"12", bytearray(b"1"), {1, 2}, object(), {"a": {1, 2}}, {"a": object()}])
async def test_a_result_whose_text_would_be_pythons_own_is_refused(result: Any) -> None:
    def lookup() -> Any:
        """Look it up."""
        return result

    with pytest.raises(TypeError, match="what JSON can hold"):
        result_text(result)
    tool = FunctionTool(lookup, {"run_in": "inline"})
    with pytest.raises(ToolError, match="the tool lookup cannot be read by a model: it returned"):
        await tool.execute(None, {})
