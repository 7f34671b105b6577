"""The spellings of a secret in the texts of services: as it is, escaped, quoted, in base64.

A service that repeats a secret rarely does so in plain text: JSON escapes its quotes, a URL has it
percent-encoded, and the header of `Basic` authentication is `user:password` in base64.
"""

from __future__ import annotations

import base64
import binascii
import html
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

SHORTEST = 6
"""Characters of the shortest spelling that is hidden: shorter ones occur in any text."""

_PLAIN = re.compile(r"[A-Za-z0-9_.~-]+")
"""Characters that no JSON, URL or HTML writes in another way."""

_UNIT = re.compile(r"(?s)(\\*)([^\\]|$)")


@dataclass(frozen=True, slots=True)
class Spelling:
    """One way to write a secret.

    Attributes:
        pattern: finds it.
        part: a text within each match, looked for first; it takes a hundredth of the time.
    """

    pattern: re.Pattern[str]
    part: str

    def replaced(self, text: str, mark: str) -> str:
        return self.pattern.sub(lambda _: mark, text) if self.part in text else text


@lru_cache(maxsize=64)
def spellings_of(secrets: tuple[str, ...]) -> tuple[Spelling, ...]:
    """Return the spellings of all secrets; those of the longest come first."""
    texts = dict.fromkeys(text for secret in secrets for text in (secret, *_decoded(secret)))
    ordered = sorted(texts, key=len, reverse=True)
    return tuple(each for text in ordered for each in (_escaped(text), *_encoded(text)))


def _escaped(secret: str) -> Spelling:
    """Return the secret with each of its characters as it is, or as JSON, a URL or HTML has it."""
    runs = _PLAIN.findall(secret)
    pattern = "".join(_unit(found[1], found[2]) for found in _UNIT.finditer(secret))
    return Spelling(re.compile(pattern), max(runs, key=len, default=""))


def _unit(backslashes: str, sign: str) -> str:
    """Return the pattern of a character and the backslashes before it.

    They are one unit, with a bound and without backtracking: which of the backslashes in a text are
    those of an escape cannot be seen, and trying all ways would take time without measure.
    """
    count = len(backslashes)
    before = rf"\\{{{count},{8 * count}}}+" if count else ""
    if _PLAIN.fullmatch(sign) or not sign:
        return _either(before + re.escape(sign), _quoted(backslashes) + re.escape(sign)) if count else re.escape(sign)
    short = json.dumps(sign)[1:-1].removeprefix("\\")  # the `n` of a line's end
    units = sign.encode("utf-16-be", "surrogatepass")
    numbers = r"\\{1,8}+".join(rf"u(?i:{units[at : at + 2].hex()})" for at in range(0, len(units), 2))
    ways = [before + re.escape(sign), rf"\\{{{count + 1},{8 * count + 8}}}+(?:{re.escape(short)}|{numbers})"]
    ways.append(_quoted(backslashes + sign))
    if sign in "&<>\"'":
        ways += [before + each for each in (html.escape(sign), f"&#{ord(sign)};", f"&#(?i:x0*{ord(sign):x});")]
    if sign == " ":
        ways.append(_quoted(backslashes) + r"\+")
    return _either(*ways)


def _quoted(text: str) -> str:
    """Return the pattern of a text in a URL, which may itself be a part of a URL (`%252F`)."""
    data = text.encode("utf-8", "surrogatepass")
    return "".join(f"%(?:25){{0,3}}(?i:{byte:02x})" for byte in data)


def _either(*ways: str) -> str:
    return f"(?:{'|'.join(dict.fromkeys(ways))})"


def _encoded(secret: str) -> Iterator[Spelling]:
    """Yield the secret in base64, also within more: the end of `user:password`, for any user.

    A group of four characters has three bytes, so that there are three ways; what the bytes around
    it share with the secret is left out, except where the text ends with it.
    """
    data = secret.encode("utf-8", "surrogatepass")
    for before in range(3):
        whole = base64.b64encode(bytes(before) + data).decode().rstrip("=")
        first = -(-before * 8 // 6)
        inner = whole[first : (before + len(data)) * 8 // 6]
        if len(inner) < SHORTEST:
            continue
        last = whole[first + len(inner) :]
        pattern = "".join(map(_base64_character, inner)) + (
            f"(?:{_base64_character(last)}(?![\\w+/-])=*)?" if last else ""
        )
        yield Spelling(re.compile(pattern), max(re.findall(r"[A-Za-z0-9]+", inner), key=len, default=""))


def _base64_character(sign: str) -> str:
    # The alphabet of URLs has other signs; JSON may escape a slash, and a URL quotes both.
    return {"+": r"(?:[+-]|%2[Bb])", "/": r"(?:\\{0,2}/|_|%2[Ff])"}.get(sign, sign)


def _decoded(secret: str) -> Iterator[str]:
    """Yield what a secret in base64 says, `user:password`, and the password alone."""
    word = secret.split()[-1] if secret.split() else ""
    try:
        text = base64.b64decode(word, validate=True).decode()
    except (binascii.Error, ValueError):
        return
    user, colon, password = text.partition(":")
    if colon and user and user.isprintable() and password.isprintable():
        yield text
        if len(password) >= SHORTEST:
            yield password
