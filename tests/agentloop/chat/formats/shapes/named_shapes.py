"""Shapes of the formats that write a call's name, and then its arguments as JSON."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from tests.agentloop.chat.formats.support import Pieces, Plain, Shape, Sources, joined, json_object, words

BEGIN, END, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
ALL, END_ALL = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"


def fenced(name: str, arguments: str) -> Pieces:
    return [BEGIN, "function", SEP, f"{name}\n```json\n{arguments}\n```", END]


def plain(name: str, arguments: str) -> Pieces:
    return [BEGIN, name, SEP, arguments, END]


def deepseek_v3(calls: Sources) -> Pieces:
    return [ALL, *joined((fenced(n, json_object(a)) for n, a in calls), "\n"), END_ALL]


def deepseek_v3_1(calls: Sources) -> Pieces:
    return [ALL, *joined(plain(n, json_object(a)) for n, a in calls), END_ALL]


def kimi(name: str, arguments: str, index: int = 0) -> Pieces:
    call_id = f"functions.{name}:{index}"
    return ["<|tool_call_begin|>", call_id, "<|tool_call_argument_begin|>", arguments, "<|tool_call_end|>"]


def kimi_k2(calls: Sources) -> Pieces:
    made = joined(kimi(n, json_object(a), i) for i, (n, a) in enumerate(calls))
    return ["<|tool_calls_section_begin|>", *made, "<|tool_calls_section_end|>"]


QUOTE = "\0"
"""Stands for the token before and after a string in the source of a value."""


class GemmaShape(Shape):
    """A shape in which strings stand between two tokens."""

    def value(self, value: Any) -> str:
        if isinstance(value, str):
            return f"{QUOTE}{value}{QUOTE}"
        if isinstance(value, list):
            return f"[{','.join(map(self.value, value))}]"
        if isinstance(value, dict):
            return f"{{{','.join(f'{self.value(key)}:{self.value(item)}' for key, item in value.items())}}}"
        return json.dumps(value)


def gemma(calls: Sources, opening: str, closing: str, quote: str) -> Pieces:
    pieces: Pieces = []
    for name, given in calls:
        written = f"call:{name}{{{','.join(f'{key}:{source}' for key, source in given)}}}"
        inner = joined(([Plain(part)] for part in written.split(QUOTE)), quote)
        pieces += [opening, *inner, closing]
    return pieces


DEEPSEEK = words(f"{BEGIN} {END} {SEP} {ALL} {END_ALL}")
SHAPES = [
    Shape("deepseek_v3", deepseek_v3, DEEPSEEK, closing=2, given=fenced, opening=BEGIN),
    Shape("deepseek_v3", deepseek_v3_1, DEEPSEEK, variant="plain", closing=2, given=plain, opening=BEGIN),
    Shape(
        "kimi_k2",
        kimi_k2,
        words(
            "<|tool_calls_section_begin|> <|tool_calls_section_end|> <|tool_call_begin|> <|tool_call_end|> "
            "<|tool_call_argument_begin|>"
        ),
        closing=2,
        given=kimi,
        opening="<|tool_call_begin|>",
    ),
    GemmaShape(
        "gemma4",
        partial(gemma, opening="<|tool_call>", closing="<tool_call|>", quote='<|"|>'),
        words('<|tool_call> <tool_call|> <|"|> <|tool_response>'),
        opening="<|tool_call>",
        quoting=False,
    ),
    GemmaShape(
        "functiongemma",
        partial(gemma, opening="<start_function_call>", closing="<end_function_call>", quote="<escape>"),
        words("<start_function_call> <end_function_call> <escape> <start_function_response>"),
        opening="<start_function_call>",
        quoting=False,
    ),
]
