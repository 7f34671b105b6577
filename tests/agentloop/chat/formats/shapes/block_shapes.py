"""Shapes of the formats that write blocks of calls, with arguments as text between named tags."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from tests.agentloop.chat.formats.support import Pieces, Plain, Shape, Sources, words

DSML = "｜DSML｜"
TEXT, OTHER = "\0", "\1"
"""Stand before the source of a string, and of another value, for DeepSeek's attribute `string`."""


def marked(tag: str, mark: str) -> Pieces:
    """Return the pieces of a tag, in which the mark is a token of its own."""
    if not mark:
        return [tag]
    before, _, after = tag.partition(mark)
    return [before, mark, after]


def blocks(calls: Sources, opening: str, closing: str, prefix: str, mark: str, frames: tuple[str, ...]) -> Pieces:
    def tag(text: str) -> Pieces:
        return marked(text, mark)

    pieces: Pieces = [*tag(opening), "\n"]
    for name, given in calls:
        pieces += [*frames[:1], *frames[1:2], *frames[2:3], *tag(f'<{prefix}invoke name="{name}">'), "\n"]
        for key, source in given:
            kind = {TEXT: ' string="true"', OTHER: ' string="false"'}.get(source[:1], "")
            pieces += tag(f'<{prefix}parameter name="{key}"{kind}>')
            pieces += [Plain(source.removeprefix(TEXT).removeprefix(OTHER)), *tag(f"</{prefix}parameter>"), "\n"]
        pieces += [*tag(f"</{prefix}invoke>"), *frames[3:], "\n"]
    return [*pieces, *tag(closing)]


class MarkedShape(Shape):
    """A shape in which an attribute tells a string from other values."""

    def value(self, value: Any) -> str:
        return TEXT + value if isinstance(value, str) else OTHER + json.dumps(value, ensure_ascii=False)


def block(name: str, opening: str, closing: str, controls: str, prefix: str = "", **more: Any) -> Shape:
    mark, frames = more.pop("mark", ""), more.pop("frames", ())
    make = MarkedShape if mark else Shape
    return make(
        name,
        partial(blocks, opening=opening, closing=closing, prefix=prefix, mark=mark, frames=frames),
        words(controls),
        language="text",
        bounds=() if mark else (f"<{prefix}invoke", f"</{prefix}invoke"),
        closing=3 if mark else 1,
        opening="" if mark else opening,
        **more,
    )


def kimi_k3(calls: Sources) -> Pieces:
    """Return elements whose tags are names between control tokens."""
    pieces: Pieces = ["<|open|>", "tools", "<|sep|>"]
    for i, (name, given) in enumerate(calls):
        pieces += ["<|open|>", f'call tool="{name}" index="{i + 1}"', "<|sep|>"]
        for key, source in given:
            kind = {TEXT: "string", OTHER: "object"}.get(source[:1])
            if kind == "object":
                kind = _kind(json.loads(source[1:]))
            pieces += ["<|open|>", f'argument key="{key}"' + (f' type="{kind}"' if kind else ""), "<|sep|>"]
            pieces += [Plain(source.removeprefix(TEXT).removeprefix(OTHER)), "<|close|>", "argument", "<|sep|>"]
        pieces += ["<|close|>", "call", "<|sep|>"]
    return [*pieces, "<|close|>", "tools", "<|sep|>"]


def _kind(value: Any) -> str:
    kinds = {bool: "boolean", int: "number", float: "number", list: "array", dict: "object", type(None): "null"}
    return kinds[type(value)]


STEP = ("<｜tool_call_begin｜>", "function", "<｜tool_sep｜>", "<｜tool_call_end｜>")
STEP_BLOCK = ("<｜tool_calls_begin｜>", "<｜tool_calls_end｜>")
SHAPES = [
    block("minimax_m2", "<minimax:tool_call>", "</minimax:tool_call>", "<minimax:tool_call> </minimax:tool_call>"),
    block("deepseek_v3_2", f"<{DSML}function_calls>", f"</{DSML}function_calls>", DSML, DSML, mark=DSML),
    block("deepseek_v3_2", f"<{DSML}tool_calls>", f"</{DSML}tool_calls>", DSML, DSML, mark=DSML, variant="v4"),
    block("deepseek_v3_2", f"<{DSML} calls>", f"</{DSML} calls>", DSML, f"{DSML} ", mark=DSML, variant="v4.1"),
    MarkedShape(
        "kimi_k3",
        kimi_k3,
        words("<|open|> <|close|> <|sep|>"),
        language="text",
        closing=6,
        ends_itself=False,
    ),
    block("step3", *STEP_BLOCK, " ".join((*STEP_BLOCK, STEP[0], *STEP[2:])), "steptml:", frames=STEP),
]
