"""`SampledText`: a sampled turn as text that keeps the positions of its control tokens."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache

_SPACE = re.compile(r"\s*")


def skip_space(text: str, position: int) -> int:
    """Return the first position from `position` on that is not white space, or the length."""
    space = _SPACE.match(text, position)
    assert space is not None  # it matches the empty text too
    return space.end()


class SampledText:
    """A sampled turn as text that knows which parts of it are control tokens (the tokenizer's added
    tokens).

    A tag that is an added token is found only where its id was sampled; the same characters spelled
    with ordinary tokens are text. A tag that contains an added token is found only where that token
    was sampled within it; any other tag is found as text. So a model that quotes a page about tool
    calls does not call a tool.

    Args:
        text: the decoded turn, control tokens included.
        controls: the spelling of each control token, by its position in `text`.
        known: the spellings of all added tokens of the tokenizer, sampled here or not.

    Attributes:
        scanned: characters that were scanned for the end of a value that cannot be read.
    """

    __slots__ = ("_controls", "_found", "_known", "_order", "_places", "_stretch", "scanned", "text")

    def __init__(self, text: str, controls: Mapping[int, str] | None = None, known: Collection[str] = ()) -> None:
        self.text = text
        self.scanned = 0
        self._controls = dict(controls or {})
        self._known = known if isinstance(known, frozenset) else frozenset(known)
        self._found: dict[str, tuple[int, int]] = {}
        self._places: dict[str, list[int]] = {}
        self._stretch: tuple[str, int] | None = None
        self._order = sorted(self._controls)
        for position, spelling in sorted(self._controls.items()):
            self._places.setdefault(spelling, []).append(position)

    def __len__(self) -> int:
        return len(self.text)

    def __repr__(self) -> str:
        return f"SampledText({self.text!r}, {self._controls!r})"

    def find(self, tag: str, start: int = 0, end: int | None = None) -> int:
        """Return the first position of `tag` within `text[start:end]`, or -1."""
        if tag not in self._known:
            return self._find_text(tag, start) if end is None else self._search(tag, start, end)

        end = len(self.text) if end is None else min(end, len(self.text))
        places = self._places.get(tag, [])
        first = bisect_left(places, start)
        return places[first] if first < len(places) and places[first] + len(tag) <= end else -1

    def _find_text(self, tag: str, start: int) -> int:
        # The last result is valid up to the position it names. Without it, a turn that repeats one
        # tag ten thousand times, and never the tag that closes it, would be searched to its end as
        # many times.
        since, place = self._found.get(tag, (start + 1, 0))
        if since <= start and (start <= place or place < 0):
            return place
        place = self._search(tag, start, len(self.text))
        self._found[tag] = start, place
        return place

    def _search(self, tag: str, start: int, end: int) -> int:
        """Return the first position of a tag that is not an added token, or -1."""
        place = self.text.find(tag, start, end)
        within = _token_within(tag, self._known)
        while within is not None and place >= 0 and self._controls.get(place + within[0]) != within[1]:
            place = self.text.find(tag, place + 1, end)
        return place

    def find_first(self, tags: Iterable[str], start: int = 0) -> tuple[int, str] | None:
        """Return the first tag from `start` on and its position: (position, tag).

        Of two tags at one position the longer is returned; None if no tag is found.
        """
        found = [(place, -len(tag), tag) for tag in tags if (place := self.find(tag, start)) >= 0]
        return (min(found)[0], min(found)[2]) if found else None

    def at(self, tag: str, position: int) -> bool:
        """Whether `tag` is at `position`."""
        return self.find(tag, position, position + len(tag)) == position

    def next_control(self, start: int) -> tuple[int, str]:
        """Return the position of the first control token from `start` on and its spelling; the
        length and an empty string if none follows.
        """
        index = bisect_left(self._order, start)
        if index == len(self._order):
            return len(self.text), ""
        return self._order[index], self._controls[self._order[index]]

    def stretch(self, position: int) -> tuple[str, int]:
        """Return text without control tokens that contains `position`, up to the next one, and
        where it begins in the turn.

        A value is read from it: no value crosses a control token.
        """
        if self._stretch is not None:
            text, start = self._stretch
            if start <= position <= start + len(text):
                return self._stretch
        self._stretch = self.text[position : self.next_control(position)[0]], position
        return self._stretch

    def knows(self, tag: str) -> bool:
        """Whether the tokenizer has a control token for this tag, or for a part of it."""
        return tag in self._known or _token_within(tag, self._known) is not None

    def skip_space(self, position: int) -> int:
        """Return the first position from `position` on that is not white space, or the length."""
        return skip_space(self.text, position)

    def cut(self, start: int, end: int | None = None) -> SampledText:
        """Return the part from `start` to `end`, with its control tokens."""
        start, end, _ = slice(start, end).indices(len(self.text))
        inside = {
            place - start: spelling
            for place, spelling in self._controls.items()
            if start <= place and place + len(spelling) <= end
        }
        return SampledText(self.text[start:end], inside, self._known)

    def __getitem__(self, part: slice) -> SampledText:
        if part.step not in (None, 1):
            raise ValueError("a SampledText cannot be sliced with a step")
        return self.cut(part.start or 0, part.stop)

    def strip(self) -> SampledText:
        """Return the text without white space at both ends."""
        start = self.skip_space(0)
        return self.cut(start, max(start, len(self.text.rstrip())))


@lru_cache(maxsize=1024)
def _token_within(tag: str, known: frozenset[str]) -> tuple[int, str] | None:
    """Return the longest added token that a tag contains, and where; None if it contains none.

    White space, words and single characters mark nothing, although some tokenizers add them too.
    """
    marks = (token for token in known if len(token) > 2 and token in tag)
    token = max((token for token in marks if not token[0].isalnum() and not token.isspace()), key=len, default="")
    return (tag.index(token), token) if token else None
