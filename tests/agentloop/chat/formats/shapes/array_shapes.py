"""Shapes of the formats that write the calls of a turn as one JSON array, or an object after a tag."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.agentloop.chat.formats.shapes.json_shapes import array, call, tagged, tagged_given
from tests.agentloop.chat.formats.support import Pieces, Shape, Sources, dumped, json_object, words


def listed(calls: Sources, opening: str, closing: str) -> Pieces:
    """Return all calls as an array between two tags; an empty tag is left out."""
    return [*filter(None, (opening, array([call(n, json_object(a)) for n, a in calls]), closing))]


def listed_given(name: str, arguments: str, opening: str, closing: str) -> Pieces:
    return [*filter(None, (opening, array([call(name, arguments)]), closing))]


def in_array(name: str, opening: str, closing: str, controls: str, **more: Any) -> Shape:
    return Shape(
        name,
        partial(listed, opening=opening, closing=closing),
        words(controls),
        closing=bool(closing),
        listed=True,
        given=partial(listed_given, opening=opening, closing=closing),
        **{"opening": opening, **more},
    )


def one_by_one(name: str, opening: str, closing: str, controls: str, **more: Any) -> Shape:
    return Shape(
        name,
        partial(tagged, opening=opening, closing=closing),
        words(controls),
        given=partial(tagged_given, opening=opening, closing=closing),
        opening=opening,
        **more,
    )


def granite_20b(calls: Sources) -> Pieces:
    return [piece for n, a in calls for piece in ("<function_call>", f" {call(n, json_object(a))} ")]


def functools(calls: Sources) -> Pieces:
    return [f"functools{array([call(n, json_object(a)) for n, a in calls])}"]


def fenced(calls: Sources) -> Pieces:
    return ["```json\n", array([call(n, json_object(a)) for n, a in calls]), "\n", "```"]


def apertus(calls: Sources) -> Pieces:
    made = array([f"{{{dumped(n)}: {json_object(a)}}}" for n, a in calls])
    return ["<|tools_prefix|>", made, "<|tools_suffix|>"]


def side_by_side(calls: Sources) -> Pieces:
    return ["<tool_calls>", "\n", "\n".join(call(n, json_object(a)) for n, a in calls), "\n", "</tool_calls>"]


def plugin(calls: Sources) -> Pieces:
    return [piece for n, a in calls for piece in plugin_given(n, json_object(a))]


def plugin_given(name: str, arguments: str) -> Pieces:
    return ["<|action_start|>", "<|plugin|>", f"\n{call(name, arguments, key='parameters')}", "<|action_end|>"]


PHI = "<|tool_call|> <|/tool_call|>"
SHAPES = [
    in_array("granite", "<|tool_call|>", "", "<|tool_call|>"),
    in_array("granite", "<tool_call>", "", "<tool_call> </tool_call>", variant="3.1", text_after=False),
    one_by_one("granite", "<tool_call>", "</tool_call>", "<tool_call> </tool_call>", variant="4"),
    Shape(
        "granite",
        granite_20b,
        words("<function_call>"),
        variant="20b",
        closing=0,
        given=lambda n, a: ["<function_call>", call(n, a)],
        opening="<function_call>",
    ),
    in_array("phi4", "<|tool_call|>", "<|/tool_call|>", PHI),
    Shape(
        "phi4",
        functools,
        frozenset(),
        variant="functools",
        closing=0,
        announced=False,
        listed=True,
        given=lambda n, a: [f"functools{array([call(n, a)])}"],
    ),
    in_array("nemotron", "<TOOLCALL>", "</TOOLCALL>", "<TOOLCALL> </TOOLCALL>"),
    one_by_one("nemotron", "<toolcall>", "</toolcall>", "", variant="object"),
    in_array("hunyuan", "<tool_calls>", "</tool_calls>", ""),
    Shape(
        "hunyuan",
        side_by_side,
        words("<tool_calls> </tool_calls>"),
        variant="side_by_side",
        listed=True,
        given=lambda n, a: ["<tool_calls>", call(n, a), "</tool_calls>"],
        opening="<tool_calls>",
    ),
    Shape(
        "apertus",
        apertus,
        words("<|tools_prefix|> <|tools_suffix|>"),
        listed=True,
        given=lambda n, a: ["<|tools_prefix|>", f"[{{{dumped(n)}: {a}}}]", "<|tools_suffix|>"],
        opening="<|tools_prefix|>",
    ),
    in_array("xlam", "", "", "", variant="bare", announced=False),
    Shape(
        "xlam",
        fenced,
        frozenset(),
        variant="fenced",
        listed=True,
        announced=False,
        given=lambda n, a: ["```json\n", array([call(n, a)]), "\n", "```"],
    ),
    one_by_one("ernie45", "<tool_call>", "</tool_call>", "<tool_call> </tool_call> <response> </response>"),
    one_by_one(
        "longcat",
        "<longcat_tool_call>",
        "</longcat_tool_call>",
        "<longcat_tool_call> </longcat_tool_call>",
        variant="json",
    ),
    Shape(
        "internlm",
        plugin,
        words("<|action_start|> <|action_end|> <|plugin|> <|interpreter|>"),
        given=plugin_given,
        opening="<|action_start|>",
    ),
]
