"""`<TOOLCALL>[{"name": .., "arguments": {..}}]</TOOLCALL>`: NVIDIA's Nemotron Nano and
Llama-Nemotron; Nemotron 3 writes calls as Qwen3-Coder does.

The first Nemotron models write `<toolcall> {..} </toolcall>`.
"""

from __future__ import annotations

from typing import ClassVar

from agentloop.chat.formats.base import TaggedFormat
from agentloop.chat.formats.json_calls.json_format import JsonFormat
from agentloop.chat.formats.variants import VariantsFormat


class _Array(JsonFormat):
    name = "nemotron_array"
    opening, closing = "<TOOLCALL>", "</TOOLCALL>"


class _Object(JsonFormat):
    name = "nemotron_object"
    opening, closing = "<toolcall>", "</toolcall>"


class NemotronFormat(VariantsFormat):
    """Calls as a JSON array, or as one object, between tags."""

    name = "nemotron"
    variants: ClassVar[tuple[TaggedFormat, ...]] = (_Array(), _Object())
