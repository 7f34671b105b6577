"""`<|tool_call_start|>[f(a="x", n=1), g()]<|tool_call_end|>`: LFM2."""

from __future__ import annotations

from agentloop.chat.formats.python_calls.python_format import PythonFormat


class Lfm2Format(PythonFormat):
    """Calls as a Python list of calls, with literals as arguments."""

    name = "lfm2"
    opening, closing = "<|tool_call_start|>", "<|tool_call_end|>"
