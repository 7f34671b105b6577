"""Ordinary values below `headers` and `env`, which are shown: hiding them would garble other texts.

All else there is a secret, whatever its key. A media type, a mode such as `warning`, a number, a
path or the address of a service occurs in many texts and opens nothing.
"""

from __future__ import annotations

import re

PLAIN_KEYS = frozenset(
    {
        "accept", "accept-charset", "accept-encoding", "accept-language", "cache-control", "connection",
        "content-encoding", "content-language", "content-length", "content-type", "from", "host", "origin",
        "pragma", "prefer", "referer", "te", "user-agent", "lang", "language", "path", "home", "pwd", "shell", "term",
        "tmpdir", "tz", "user", "logname", "pythonpath", "pythonioencoding", "node_path", "node_env",
    }
)  # fmt: skip
"""Headers and variables that hold no secret, in lower case."""

LONGEST_WORD = 12
"""Characters of the longest word of letters that is ordinary: `development`."""

LONGEST_NUMBER = 10
"""Digits of the longest number that is ordinary: a time in seconds."""

_ORDINARY = re.compile(
    r"""
    [+-]?[0-9]+(?:[.,:/eE+-]{1,2}[0-9]+)*%?[A-Za-z]{0,2}        # 30, 0.5, 1e-3, 10MB, 2025-03-26, 127.0.0.1:80
    | v?[0-9]+(?:\.[0-9]+)+(?:[a-z-]+[0-9]{0,2})?               # v1.2.3rc1
    | (?:\w+/)?[a-z]{2,3}(?:[_-][A-Z]{2})?\.[Uu][Tt][Ff]-?8    # en_US.UTF-8
    | [A-Z][A-Za-z]+(?:/[A-Z][A-Za-z_]+){1,2}                   # Europe/Berlin
    | (?:[a-z]+|\*)/(?:[a-z.+-]+|\*)                            # application/json
    | (?:~|\.{1,2})?(?:/[a-z][a-z._-]*)(?:/[A-Za-z0-9_.@-]{1,40})*/?(?::[a-z0-9/._:-]+)?   # /usr/bin:/bin
    | (?:https?://)?[a-z0-9-]{1,20}(?:\.[a-z0-9-]{1,20})*(?:\.[a-z]{2,10}|:[0-9]{2,5})(?:/[a-z][a-z._-]*|/v[0-9])*/?
    """,
    re.VERBOSE,
)
_WORDS = re.compile(r"[A-Za-z]+(?:[ _-][A-Za-z]+)*")
_NUMBERS = re.compile(r"[0-9]+")


def is_ordinary(key: str, value: str) -> bool:
    """Whether a value that is written below `headers` or `env` is not taken for a secret."""
    text = value.strip()
    if key.lower() in PLAIN_KEYS:
        return True
    if _WORDS.fullmatch(text):  # true, warning, DEBUG, my-team
        return all(len(word) <= LONGEST_WORD and _one_case(word) for word in re.split(r"[ _-]", text))
    if any(len(number) > LONGEST_NUMBER for number in _NUMBERS.findall(text)):
        return False
    return all(_ORDINARY.fullmatch(part) is not None for part in re.split(r"[,;] *", text) if part)


def _one_case(word: str) -> bool:
    return word.islower() or word.isupper() or word.istitle()
