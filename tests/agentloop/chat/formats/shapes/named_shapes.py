"""Shapes of the formats that write a call's name, and then its arguments as JSON."""

from __future__ import annotations

from tests.agentloop.chat.formats.support import Pieces, Shape, Sources, joined, json_object, words

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


DEEPSEEK = words(f"{BEGIN} {END} {SEP} {ALL} {END_ALL}")
SHAPES = [
    Shape("deepseek_v3", deepseek_v3, DEEPSEEK, closing=2, given=fenced, opening=BEGIN),
    Shape("deepseek_v3", deepseek_v3_1, DEEPSEEK, variant="plain", closing=2, given=plain, opening=BEGIN),
]
