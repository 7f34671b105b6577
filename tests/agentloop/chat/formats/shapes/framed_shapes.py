"""Shapes of the formats that write a turn as framed messages."""

from __future__ import annotations

from tests.agentloop.chat.formats.support import Pieces, Shape, Sources, joined, json_object, words


def message(name: str, arguments: str) -> Pieces:
    header = ["<|channel|>", f"commentary to=functions.{name} ", "<|constrain|>", "json"]
    return [*header, "<|message|>", arguments, "<|call|>"]


def recipient_first(name: str, arguments: str) -> Pieces:
    header = [f" to=functions.{name}", "<|channel|>", "commentary json"]
    return [*header, "<|message|>", arguments, "<|call|>"]


def final(text: str) -> Pieces:
    return ["<|channel|>", "final", "<|message|>", text, "<|end|>", "<|start|>", "assistant"]


def harmony(calls: Sources) -> Pieces:
    return joined((message(n, json_object(a)) for n, a in calls), "<|start|>", "assistant")


def harmony_recipient_first(calls: Sources) -> Pieces:
    return joined((recipient_first(n, json_object(a)) for n, a in calls), "<|start|>", "assistant")


HARMONY = words("<|start|> <|channel|> <|constrain|> <|message|> <|end|> <|call|> <|return|>")
SHAPES = [
    Shape("harmony", harmony, HARMONY, given=message, text_after=False, said=final),
    Shape(
        "harmony",
        harmony_recipient_first,
        HARMONY,
        variant="recipient_first",
        given=recipient_first,
        text_after=False,
        said=final,
    ),
]
