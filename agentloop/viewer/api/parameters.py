"""Query parameters, checked: what is missing, unknown, repeated or out of bounds is a 400."""

from __future__ import annotations

import math
from collections.abc import Sequence

from agentloop.text import did_you_mean
from agentloop.web.refusals import Refusal

LONGEST_VALUE = 2_000
"""Characters of a value. Group and task ids are texts of the user's own data."""

MOST_VALUES = 100
"""Values of a parameter that may be repeated."""


class Parameters:
    """The query parameters of one request. Each method reads one; `finish` refuses the others.

    Args:
        pairs: names and values in the order of the query.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        self._values: dict[str, list[str]] = {}
        self._known: set[str] = set()
        for name, value in pairs:
            if len(value) > LONGEST_VALUE:
                raise Refusal(400, f"{name[:80]!r} has {len(value)} characters", f"at most {LONGEST_VALUE} are allowed")
            self._values.setdefault(name, []).append(value)

    def texts(self, name: str, options: Sequence[str] | None = None) -> tuple[str, ...]:
        """Return all values of a parameter that may be repeated; empty ones count as absent."""
        self._known.add(name)
        values = [value for value in self._values.get(name, ()) if value]
        if len(values) > MOST_VALUES:
            raise Refusal(400, f"{name} is given {len(values)} times", f"at most {MOST_VALUES} are allowed")
        for value in values:
            if options is not None and value not in options:
                raise Refusal(400, f"{name}={value!r} is not a choice", f"give one of: {', '.join(options)}")
        return tuple(values)

    def text(self, name: str, default: str = "", options: Sequence[str] | None = None) -> str:
        """Return one value, or `default`."""
        values = self.texts(name, options)
        if len(values) > 1:
            raise Refusal(400, f"{name} is given {len(values)} times", "give it once")
        return values[0] if values else default

    def required(self, name: str, options: Sequence[str] | None = None) -> str:
        """Return one value that must be there."""
        value = self.text(name, "", options)
        if not value:
            raise Refusal(400, f"the parameter {name} is missing", f"add ?{name}=")
        return value

    def integer(self, name: str, default: int, least: int, most: int) -> int:
        """Return a whole number within bounds, or `default`."""
        text = self.text(name)
        if not text:
            return default
        sign, digits = text[:1], text.removeprefix("-")
        if not (digits.isascii() and digits.isdecimal()) or len(digits) > 18:
            raise Refusal(400, f"{name}={text[:40]!r} is not a whole number", f"give one from {least} to {most}")
        value = -int(digits) if sign == "-" else int(digits)
        if not least <= value <= most:
            raise Refusal(400, f"{name}={value} is out of bounds", f"give a number from {least} to {most}")
        return value

    def number(self, name: str) -> float | None:
        """Return a finite number, or None if it is absent."""
        text = self.text(name)
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise Refusal(400, f"{name}={text[:40]!r} is not a finite number")
        return value

    def finish(self) -> None:
        """Refuse parameters that no method has read."""
        for name in self._values:
            if name not in self._known:
                known = sorted(self._known)
                fix = did_you_mean(name, known, f"known: {', '.join(known)}" if known else "this path takes none")
                raise Refusal(400, f"there is no parameter {name[:80]!r}", fix)
