"""Every shape, for the tests that treat all formats alike. A new format adds its shape to one of the
lists.
"""

from __future__ import annotations

from tests.agentloop.chat.formats.shapes import (
    array_shapes,
    block_shapes,
    framed_shapes,
    json_shapes,
    named_shapes,
    python_shapes,
    tagged_shapes,
)

SHAPES = [
    *json_shapes.SHAPES,
    *array_shapes.SHAPES,
    *named_shapes.SHAPES,
    *tagged_shapes.SHAPES,
    *block_shapes.SHAPES,
    *python_shapes.SHAPES,
    *framed_shapes.SHAPES,
]
