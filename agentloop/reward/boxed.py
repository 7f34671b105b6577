r"""Find the answer in `\boxed{...}`, in one pass over the text."""

from __future__ import annotations

import re

_BRACES = re.compile(r"\\boxed\s*\{|\\fbox\s*\{|(?:\\\\)+|\\[{}]|[{}]")


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last complete `\boxed{...}`; None if there is none.

    Braces nest, and escaped ones (`\{`) are text. Of boxes inside each other the innermost counts.
    An unclosed box, as at the end of a cut text, does not count.

    >>> last_boxed(r"so \boxed{1}, no, \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    opened: list[int | None] = []
    best: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        found = match.group()
        if found == "}":
            start = opened.pop() if opened else None
            if start is not None and (best is None or start > best[0]):
                best = start, match.start()
        elif found == "{":
            opened.append(None)
        elif found.endswith("{") and len(found) > 2:
            opened.append(match.end())
    return None if best is None else text[best[0] : best[1]].strip()
