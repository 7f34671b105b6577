"""`<seed:tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></seed:tool_call>`:
ByteDance's Seed-OSS.

The grammar of Qwen3-Coder; values stand beside their tags, and those that are not text are written
in Python syntax.
"""

from __future__ import annotations

from agentloop.chat.formats.tagged_calls.qwen3_coder import Qwen3CoderFormat


class SeedOssFormat(Qwen3CoderFormat):
    """Calls whose arguments are text between tags, typed by the tool's schema."""

    name = "seed_oss"
    reasoning_tags = ("<seed:think>", "</seed:think>")
    opening, closing = "<seed:tool_call>", "</seed:tool_call>"
    own_lines = False
