"""Shapes of the formats that write arguments as bare text between tags."""

from __future__ import annotations

from tests.agentloop.chat.formats.support import Pieces, Plain, Shape, Sources, joined, words


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
]
