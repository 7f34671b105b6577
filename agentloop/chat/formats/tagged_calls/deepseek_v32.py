"""DeepSeek V3.2: calls whose arguments are text between tags that contain a marker token.

<｜DSML｜function_calls>
<｜DSML｜invoke name="NAME">
<｜DSML｜parameter name="KEY" string="true">VALUE</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜function_calls>

V4 calls the block `tool_calls`; V4.1 calls it `calls` and writes a space after the marker of each
tag. The attribute `string` says whether the value is text or JSON; the arguments of a call may also
be one JSON object.
"""

from __future__ import annotations

from typing import ClassVar

from agentloop.chat.formats.base import TaggedFormat
from agentloop.chat.formats.tagged_calls.invoke import InvokeFormat
from agentloop.chat.formats.variants import VariantsFormat

MARK = "｜DSML｜"


class _V32(InvokeFormat):
    name = "deepseek_v3_2_calls"
    opening, closing = "<｜DSML｜function_calls>", "</｜DSML｜function_calls>"
    prefix = mark = MARK


class _V4(InvokeFormat):
    name = "deepseek_v4_calls"
    opening, closing = "<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"
    prefix = mark = MARK


class _V41(InvokeFormat):
    name = "deepseek_v4_1_calls"
    opening, closing = "<｜DSML｜ calls>", "</｜DSML｜ calls>"
    prefix, mark = f"{MARK} ", MARK


class DeepSeekV32Format(VariantsFormat):
    """Calls whose arguments are text between tags, typed by an attribute of the tag."""

    name = "deepseek_v3_2"
    variants: ClassVar[tuple[TaggedFormat, ...]] = (_V32(), _V4(), _V41())
