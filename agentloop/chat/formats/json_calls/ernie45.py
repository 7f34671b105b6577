"""`<tool_call>\\n{"name": .., "arguments": {..}}\\n</tool_call>`: ERNIE 4.5.

The answer is framed by `<response>` and `</response>`.
"""

from __future__ import annotations

from agentloop.chat.formats.json_calls.json_format import JsonFormat


class Ernie45Format(JsonFormat):
    """Calls as Hermes writes them; the tags around the answer are dropped."""

    name = "ernie45"
    opening, closing = "<tool_call>", "</tool_call>"
    dropped = ("<response>", "</response>")
