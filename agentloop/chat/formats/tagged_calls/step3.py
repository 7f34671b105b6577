"""`<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="NAME"><steptml:parameter
name="KEY">VALUE</steptml:parameter></steptml:invoke><｜tool_call_end｜>`: Step 3.

A turn's calls are enclosed in `<｜tool_calls_begin｜>` and `<｜tool_calls_end｜>`. Step 3.5 writes
calls as Qwen3-Coder does.
"""

from __future__ import annotations

from agentloop.chat.formats.tagged_calls.invoke import InvokeFormat


class Step3Format(InvokeFormat):
    """Calls whose arguments are text between tags, typed by the tool's schema."""

    name = "step3"
    opening, closing = "<｜tool_calls_begin｜>", "<｜tool_calls_end｜>"
    prefix = "steptml:"
    frames = (
        "<｜tool_call_begin｜>",
        "<｜tool_call_begin>｜>",  # so misspelled where Step 3's own template renders a call
        "function<｜tool_sep｜>",
        "<｜tool_sep｜>",
        "<｜tool_call_end｜>",
        "<steptml:toolcall>",
        "</steptml:toolcall>",
    )
