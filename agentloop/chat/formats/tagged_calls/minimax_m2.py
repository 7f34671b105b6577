"""`<minimax:tool_call><invoke name="NAME"><parameter name="KEY">VALUE</parameter></invoke>
</minimax:tool_call>`: MiniMax M2.
"""

from __future__ import annotations

from agentloop.chat.formats.tagged_calls.invoke import InvokeFormat


class MiniMaxM2Format(InvokeFormat):
    """Calls whose arguments are text between tags, typed by the tool's schema."""

    name = "minimax_m2"
    opening, closing = "<minimax:tool_call>", "</minimax:tool_call>"
