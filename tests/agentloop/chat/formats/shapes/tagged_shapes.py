"""Shapes of the formats that write arguments as bare text between tags."""

from __future__ import annotations

from functools import partial

from tests.agentloop.chat.formats.support import Pieces, Plain, Shape, Sources, joined, words


def seed_oss(calls: Sources) -> Pieces:
    def one(name: str, given: list[tuple[str, str]]) -> Pieces:
        inner = [piece for key, source in given for piece in (f"<parameter={key}>", Plain(source), "</parameter>\n")]
        return ["<seed:tool_call>", f"\n<function={name}>\n", *inner, "</function>\n", "</seed:tool_call>"]

    return joined((one(*call) for call in calls), "\n")


def pairs(calls: Sources, around: str, call: str, separator: str, key: str, value: str) -> Pieces:
    """Return calls as names, and pairs of keys and values, in tags with these names."""

    def one(name: str, given: list[tuple[str, str]]) -> Pieces:
        inner = [
            piece
            for k, source in given
            for piece in (f"<{key}>", k, f"</{key}>", "\n", f"<{value}>", Plain(source), f"</{value}>", "\n")
        ]
        return [f"<{call}>", name, *filter(None, (separator,)), "\n", *inner, f"</{call}>", "\n"]

    made = joined(one(*call) for call in calls)
    return [f"<{around}>", "\n", *made, f"</{around}>"] if around else made


def qwen3_coder(calls: Sources) -> Pieces:
    def one(name: str, given: list[tuple[str, str]]) -> Pieces:
        inner = [
            piece for key, source in given for piece in (f"<parameter={key}>\n", Plain(source), "\n</parameter>\n")
        ]
        return ["<tool_call>", f"\n<function={name}>\n", *inner, "</function>\n", "</tool_call>"]

    return joined((one(*call) for call in calls), "\n")


def glm45(calls: Sources) -> Pieces:
    def one(name: str, given: list[tuple[str, str]]) -> Pieces:
        inner = [
            piece
            for key, source in given
            for piece in ("<arg_key>", key, "</arg_key>", "\n", "<arg_value>", Plain(source), "</arg_value>", "\n")
        ]
        return ["<tool_call>", f"{name}\n", *inner, "</tool_call>"]

    return ["\n", *joined(one(*call) for call in calls)]


SHAPES = [
    Shape("qwen3_coder", qwen3_coder, words("<tool_call> </tool_call>"), language="text", opening="<tool_call>"),
    Shape(
        "glm45",
        glm45,
        words("<tool_call> </tool_call> <arg_key> </arg_key> <arg_value> </arg_value>"),
        language="text",
        ends_itself=False,
        opening="<tool_call>",
    ),
    Shape(
        "seed_oss", seed_oss, words("<seed:tool_call> </seed:tool_call>"), language="text", opening="<seed:tool_call>"
    ),
    Shape(
        "hunyuan",
        partial(pairs, around="tool_calls", call="tool_call", separator="<tool_sep>", key="arg_key", value="arg_value"),
        words(
            "<tool_calls> </tool_calls> <tool_call> </tool_call> <tool_sep> "
            "<arg_key> </arg_key> <arg_value> </arg_value>"
        ),
        language="text",
        variant="hy3",
        ends_itself=False,
        closing=3,
        opening="<tool_call>",
    ),
    Shape(
        "longcat",
        partial(
            pairs, around="", call="longcat_tool_call", separator="", key="longcat_arg_key", value="longcat_arg_value"
        ),
        words(
            "<longcat_tool_call> </longcat_tool_call> <longcat_arg_key> </longcat_arg_key> "
            "<longcat_arg_value> </longcat_arg_value>"
        ),
        language="text",
        closing=2,
        ends_itself=False,
        opening="<longcat_tool_call>",
    ),
]
