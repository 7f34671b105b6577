"""Make untrusted text safe to display, and format numbers briefly, for the report and the console.

Model and tool output is untrusted. Besides HTML (which the template escapes) it can contain
terminal escape sequences, lone surrogates, which cannot be encoded, and characters that reorder the
visible text.
"""

from __future__ import annotations

import base64
import contextlib
import difflib
import math
import re
from collections.abc import Iterable
from typing import Any

_REPLACEMENT = "\ufffd"
_VISIBLE: dict[int, str] = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},  # control pictures
    0x7F: "\u2421",
    **dict.fromkeys(range(0x80, 0xA0), _REPLACEMENT),
    **dict.fromkeys(range(0xD800, 0xE000), _REPLACEMENT),
    # Marks that change the direction of text are shown by their code, so that nothing is displayed
    # out of order.
    **{code: f"⟨U+{code:04X}⟩" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C)},
    # Some terminals and `str.splitlines` end a line at these.
    0x2028: "⟨U+2028⟩",
    0x2029: "⟨U+2029⟩",
    0xFFFE: _REPLACEMENT,
    0xFFFF: _REPLACEMENT,
}


def clean(value: object, limit: int | None = None) -> str:
    """Return `value` as text that any terminal and any browser displays unchanged.

    Newlines and tabs stay. Other control characters become their pictures (ESC is `␛`), lone
    surrogates become U+FFFD, and direction marks their codes. Text of more than `limit` characters
    is cut and ends in `…`.
    """
    text = str(value)
    if limit is not None and len(text) > limit:
        text = text[: max(0, limit - 1)] + "…"
    return text.translate(_VISIBLE)


def finite(value: object) -> float | None:
    """Return `value` as a float if it is a finite number, else None. Booleans are not numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def number(value: float | None, digits: int = 3) -> str:
    """Return a number in about five characters: `0.934`, `18.4k`, `1.2e-7`; `–` for None."""
    if value is None or not math.isfinite(value):
        return "–"

    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3 or size >= 1e9:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"

    for bound, factor, suffix in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= bound:
            return f"{value / factor:.{1 if size / factor < 100 else 0}f}{suffix}"

    if size >= 1000:
        return f"{value:.0f}"
    if float(value).is_integer():
        return str(int(value))

    decimals = max(0, digits - 1 - max(0, math.floor(math.log10(size))) + (1 if size < 1 else 0))
    return f"{value:.{decimals}f}"


def counted(count: int, thing: str) -> str:
    """Return a number of things: `1 row`, `2,000 rows`; the plural of `thing` ends in s."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def with_article(noun: str) -> str:
    """Return a noun behind its article: `a float`, `an int`."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def seconds(value: float | None) -> str:
    """Return a duration: `0.84s`, `12.3s`, `4m 02s`, `1h 03m`; `–` for None."""
    if value is None or not math.isfinite(value):
        return "–"

    if value < 10:
        return f"{value:.2f}s" if value < 1 else f"{value:.1f}s"
    if value < 60:
        return f"{value:.0f}s" if value >= 59.5 else f"{value:.1f}s"

    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m"


def plain_json(value: Any) -> str:
    """Return a config value as short text: strings unchanged, other values as in a recipe."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(plain_json(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {plain_json(item)}" for key, item in value.items()) + "}"
    return str(value)


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """Return a fix that names the nearest of `known`, or `otherwise` if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else otherwise


SECRET_KEY = re.compile(
    r"(?:^|[_.-])(?:token|password|secret|api[_-]?key|credentials?|authorization)$|(?:^|[_.-])headers(?:\.|$)",
    re.IGNORECASE,
)
"""Keys whose values are secrets, by their last word; and everything below `headers`."""

_SECRET_IN_VALUE = re.compile(
    r"[\[{].*(?:token|password|secret|api_?key|credential)|//(?:[^/\s?#]+|[^/@\s]*:[^/@\s]*)@|//[^\s?]*\?|--[\w-]*(?:token|password|secret|api-?key)",
    re.IGNORECASE | re.DOTALL,
)
_SECRET_OPTION = re.compile(r"^(--[\w-]*(?:token|password|secret|api-?key))(=.*)?$", re.IGNORECASE | re.DOTALL)
_SECRET_IN_URL = re.compile(r"(?<=//)(?:[^/\s?#]+|[^/@\s]*:[^/@\s]*)(?=@)")
"""User and password; a token is given as a user alone. A password may have any sign but a slash."""

HIDDEN = "(hidden)"
DEEPEST = 100
"""Levels of JSON data that are looked through; configs have few."""

SHORTEST_SECRET = 4
"""Characters of the shortest part of a value that `hide_values` hides."""


def hide_override(argument: str) -> str:
    """Replace the value of a `key=value` argument that holds a secret; return others unchanged.

    `rollout.token=abc` becomes `rollout.token=(hidden)`; so do a mapping that has such a key and an
    address with a query.
    """
    key, equals, value = argument.partition("=")
    secret = SECRET_KEY.search(key.strip().lstrip("+")) or _SECRET_IN_VALUE.search(value)
    return f"{key}={HIDDEN}" if equals and value and secret else argument


def hide_secrets(value: Any, depth: int = 0) -> Any:
    """Return JSON data in which secrets are replaced by `(hidden)`.

    Secrets are values of keys such as `token` and `api_key` at any depth, the same options in a
    list of command-line arguments (`--api-key=..`), and users and passwords in URLs. What is nested
    more than `DEEPEST` levels below `depth` 0 is hidden, too.
    """
    if depth > DEEPEST and isinstance(value, dict | list | tuple):
        return HIDDEN
    if isinstance(value, dict):
        return {
            key: _hidden(item, depth + 1) if SECRET_KEY.search(str(key)) else hide_secrets(item, depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        shown: list[Any] = []
        follows = False  # `--api-key VALUE` as two arguments
        for item in value:
            option = _SECRET_OPTION.match(item) if isinstance(item, str) else None
            if follows and isinstance(item, str) and not option:
                shown.append(HIDDEN)
            elif option:
                shown.append(f"{option[1]}={HIDDEN}" if option[2] else item)
            else:
                shown.append(hide_secrets(item, depth + 1))
            follows = option is not None and not option[2]
        return shown
    return _SECRET_IN_URL.sub(HIDDEN, value) if isinstance(value, str) else value


def hide_values(text: str, values: Iterable[str]) -> str:
    """Return text in which values such as those of headers, and their words, are `(hidden)`.

    So are the user and the password of `Basic` authentication, which are in base64. Parts of fewer
    than 4 characters stay: they are not secrets, and occur in any text.
    """
    parts = {part for value in values for word in (value, *value.split()) for part in (word, *_in_base64(word))}
    for part in sorted((part for part in parts if len(part) >= SHORTEST_SECRET), key=len, reverse=True):
        text = text.replace(part, HIDDEN)
    return text


def _in_base64(word: str) -> list[str]:
    """Return the parts of what a word encodes, `user:password`; nothing if it encodes no text."""
    with contextlib.suppress(ValueError):
        return base64.b64decode(word, validate=True).decode().split(":")
    return []


def _hidden(value: Any, depth: int) -> Any:
    """Hide the value of a secret key; of a mapping, such as `headers`, that of each key."""
    if isinstance(value, dict) and depth <= DEEPEST:
        return {key: _hidden(item, depth + 1) for key, item in value.items()}
    return HIDDEN if value and not isinstance(value, bool) else value
