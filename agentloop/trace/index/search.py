"""Full-text search: what is indexed of a text, and how a reader's words become an expression."""

from __future__ import annotations

import re

from agentloop.errors import UserError

FIELDS = {
    "prompt": "prompt", "answer": "answer", "call": "calls", "calls": "calls", "tool": "calls", "result": "results",
    "results": "results", "error": "errors", "errors": "errors",
}  # fmt: skip
"""Names that a search can put before a word (`tool:search`), and their columns."""

LONGEST_SEARCH = 400
"""Characters of a search."""

MOST_WORDS = 32

FIRST_CHARACTERS, LAST_CHARACTERS = 16_000, 8_000
"""What is indexed of a longer text: of an episode's prompt, answers, calls, results, each."""

MARKED_PREFIX = 3
"""Characters from which the last word of a search also finds longer ones: search as one types."""

# Scripts without spaces between words: each character is a word of its own, so that any part of a
# sentence is found. CJK ideographs, kana, hangul, Thai, Lao, Khmer, Myanmar.
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff])"
)
_PART = re.compile(r'(?P<no>-)?(?:(?P<field>[a-z]+):)?(?:"(?P<phrase>[^"]*)"?|(?P<word>[^\s"]+))')
_LETTER = re.compile(r"\w")


class SearchError(UserError):
    """A search cannot be understood."""


def searchable(text: str) -> str:
    """Return a text as it is indexed: bounded, unspaced scripts split, no lone surrogate."""
    if len(text) > FIRST_CHARACTERS + LAST_CHARACTERS:
        text = f"{text[:FIRST_CHARACTERS]} {text[-LAST_CHARACTERS:]}"
    if text.isascii():
        return text
    return _UNSPACED.sub(r" \1 ", text).encode("utf-8", "replace").decode()


def match_expression(search: str) -> str:
    """Translate a reader's search into an FTS5 expression.

    All words must occur, in any order. `"two words"` must stand side by side, `-word` must not
    occur, `tool:name` looks in one column, `wor*` finds what begins so; so does the last word.
    Nothing that is typed reaches FTS5 as syntax.

    Raises:
        SearchError: it is too long, has no letter or digit, or only excludes.
    """
    if len(search) > LONGEST_SEARCH:
        raise SearchError(f"the search has {len(search)} characters; at most {LONGEST_SEARCH} are allowed")
    wanted: list[str] = []
    unwanted: list[str] = []
    parts = list(_PART.finditer(search))
    if len(parts) > MOST_WORDS:
        raise SearchError(f"the search has {len(parts)} words; at most {MOST_WORDS} are allowed")
    for number, part in enumerate(parts):
        column, text = _column_and_text(part)
        words = searchable(text.rstrip("*"))
        if not _LETTER.search(words.replace("_", " ")):
            continue
        last = number == len(parts) - 1 and part["word"] is not None and part.end() == len(search)
        begins = text.endswith("*") or (last and not part["no"] and len(text) >= MARKED_PREFIX)
        phrase = f'"{words.replace(chr(34), " ").replace(chr(0), " ")}"' + (" *" if begins else "")
        (unwanted if part["no"] else wanted).append(f"{{{column}}} : {phrase}" if column else phrase)
    if not wanted:
        raise SearchError(
            "the search has no word to look for", 'give a word, a "phrase", or one in a column: tool:name, error:name'
        )
    found = " AND ".join(wanted)
    return f"({found})" + "".join(f" NOT {phrase}" for phrase in unwanted)


def _column_and_text(part: re.Match[str]) -> tuple[str | None, str]:
    """Return the column that a part names, if it does, and its words."""
    text = part["phrase"] if part["phrase"] is not None else part["word"]
    if part["field"] is None:
        return None, text
    if (column := FIELDS.get(part["field"])) is not None:
        return column, text
    return None, f"{part['field']}:{text}"  # `http://host`: a text with a colon
