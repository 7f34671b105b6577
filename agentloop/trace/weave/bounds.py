"""Keep a call below the size that weave's server drops: cut its longest texts, with a mark."""

from __future__ import annotations

import json
from typing import Any

import orjson

from agentloop.trace.weave.calls import EpisodeCall

MOST_BYTES = 3_600_000
"""Of inputs, output and attributes of a call as JSON. weave drops a call over 3,670,016 bytes; the
rest is for its ids, times and summary."""

LONGEST_FORM = 6
"""How many times longer JSON is in ASCII, with spaces, than in UTF-8 without: of a delete character
of one byte, six."""

SHORTEST = 256
"""Characters that a text keeps at the least; below, the whole values are left out."""


def bound(call: EpisodeCall, where: str, most: int = MOST_BYTES) -> None:
    """Shorten a call in place if it is too large.

    Args:
        where: tells the reader where the whole text is.
        most: bytes.
    """
    if _surely_fits(call, most) or size_of(call.inputs, call.output, call.attributes) <= most:
        return
    inputs, output, attributes = call.inputs, call.output, call.attributes
    longest = most
    while longest >= SHORTEST:
        call.inputs, call.output = _cut(inputs, longest, where), _cut(output, longest, where)
        call.attributes = _cut(attributes, longest, where)
        if size_of(call.inputs, call.output, call.attributes) <= most:
            return
        longest //= 2
    # Thousands of values: an agent loop with as many messages.
    mark = f"[too large for weave; {where}]"
    call.inputs, call.output = {"cut": mark}, {"cut": mark}


def _surely_fits(call: EpisodeCall, most: int) -> bool:
    """Whether a call is far below the limit: quick, and true of nearly all calls."""
    try:
        text = orjson.dumps((call.inputs, call.output, call.attributes), default=_image)
    except TypeError:  # an integer of more than 64 bits
        return False
    return LONGEST_FORM * len(text) <= most


def size_of(*values: Any) -> int:
    """Return the bytes of values as JSON, in its longest form: only ASCII."""
    return len(json.dumps(values, default=_image))


def _image(_: Any) -> str:
    """Stand for an image, which is sent as the name of a file."""
    return "x" * 500


def _cut(value: Any, longest: int, where: str) -> Any:
    if isinstance(value, str):
        return value if len(value) <= longest else f"{value[:longest]}\n[cut: {len(value):,} characters; {where}]"
    if isinstance(value, dict):
        return {key: _cut(item, longest, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_cut(item, longest, where) for item in value]
    return value
