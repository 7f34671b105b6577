"""Every shape, for the tests that treat all formats alike. A new format adds its shape to one of the
lists.
"""

from __future__ import annotations

from tests.agentloop.chat.formats.shapes import framed_calls, json_calls, named_calls, python_calls, tagged_calls

SHAPES = [
    *json_calls.SHAPES,
    *named_calls.SHAPES,
    *tagged_calls.SHAPES,
    *python_calls.SHAPES,
    *framed_calls.SHAPES,
]
