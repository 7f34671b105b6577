"""Estimates of how many tokens a text has, for tools, which know no tokenizer.

Rather too many than too few. What a model is shown is cut exactly by the agent's
`max_tool_response_tokens`; the estimates decide what of a long result is worth its place. Time is
linear in the text.
"""

from __future__ import annotations

import re

_TOKEN = re.compile(r"[A-Za-z]{1,7}|[0-9]{1,3}|\n|[^\S\n]{2,16}|[^\sA-Za-z0-9]")


def estimated_tokens(text: str) -> int:
    """Return about how many tokens a text has."""
    return sum(1 for _ in _TOKEN.finditer(text))


def cut_end(text: str, most: int) -> str:
    """Return the beginning of a text, at most `most` tokens, and a mark where it is cut."""
    for count, match in enumerate(_TOKEN.finditer(text)):
        if count == most:
            return text[: match.start()].rstrip() + " ..."
    return text


def cut_middle(text: str, most: int) -> str:
    """Return beginning and end of a text, at most `most` tokens, with a mark between them."""
    ends = [match.end() for match in _TOKEN.finditer(text)]
    if len(ends) <= most:
        return text
    head = text[: ends[most // 2 - 1]] if most > 1 else ""
    tail = text[ends[len(ends) - (most - most // 2) - 1] :]
    return f"{head}\n[cut: about {len(ends) - most} tokens]\n{tail}"
