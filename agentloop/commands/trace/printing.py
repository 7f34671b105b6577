"""What the commands print: tables, lines and JSON, for a terminal or for a pipe.

On a terminal there are colours, and long cells are cut to its width. Anywhere else (a pipe, a file,
NO_COLOR) the same text is plain and complete. Text of models and tools is neutral in both
(`agentloop.text.clean`).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from agentloop.text import clean

WIDE = 10**6
"""Columns of an output that is not a terminal: nothing is wrapped or cut."""


class Printer:
    """Print styled lines and tables to standard output."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        from rich.console import Console

        self.stream = stream if stream is not None else sys.stdout
        quiet = any(os.environ.get(name) for name in ("NO_COLOR", "CI")) or os.environ.get("TERM") == "dumb"
        self.terminal = self.stream.isatty() and not quiet
        self._rich = Console(
            file=self.stream,
            force_terminal=self.terminal,
            color_system="auto" if self.terminal else None,
            width=None if self.terminal else WIDE,
            highlight=False,
            markup=False,
            emoji=False,
        )

    @property
    def width(self) -> int:
        """Columns of the terminal, or `WIDE`."""
        return self._rich.width

    def line(self, *parts: str | tuple[str, str]) -> None:
        """Print a line; a part may be (text, style). Newlines in it start further lines."""
        from rich.text import Text

        text = Text()
        for part in parts:
            words, style = (part, "") if isinstance(part, str) else part
            text.append(self._encodable(clean(words)), style=style)
        self._rich.print(text, soft_wrap=True)

    def table(self, titles: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
        """Print rows under titles; the last column takes what room is left.

        Args:
            right: titles of the columns of numbers.
        """
        cells = [[self._encodable(clean(cell).replace("\n", "⏎").replace("\t", " ")) for cell in row] for row in rows]
        widths = [max(len(title), *(len(row[i]) for row in cells), 0) for i, title in enumerate(titles)]
        for number, row in enumerate([list(titles), *cells]):
            fitted = [
                cell.rjust(width) if title in right else cell.ljust(width)
                for title, cell, width in zip(titles, row, widths, strict=True)
            ]
            text = "  ".join(fitted).rstrip()
            if self.terminal and len(text) > self.width:
                text = text[: self.width - 1] + "…"
            self.line((text, "dim" if number == 0 else ""))

    def tree(self, label: str, children: Any) -> None:
        """Print a tree.

        Args:
            children: list of (label, style, children).
        """
        from rich.text import Text
        from rich.tree import Tree

        def grow(node: Tree, below: Any) -> None:
            for text, style, further in below:
                grow(node.add(Text(self._encodable(clean(text)), style=style, no_wrap=True)), further)

        root = Tree(Text(self._encodable(clean(label)), no_wrap=True), guide_style="dim")
        grow(root, children)
        self._rich.print(root, soft_wrap=True)

    def _encodable(self, text: str) -> str:
        """Replace characters that the stream cannot encode."""
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        return text.encode(encoding, "replace").decode(encoding)


@contextmanager
def progress(total: int, unit: str) -> Iterator[Callable[[], None]]:
    """Yield a function that counts one more of `total`; shown on standard error if that is a
    terminal."""
    import typer

    if not sys.stderr.isatty():
        yield lambda: None
        return
    with typer.progressbar(length=total, label=unit, file=sys.stderr, show_pos=True) as bar:
        yield lambda: bar.update(1)


def print_json(data: Any) -> None:
    """Print JSON; NaN and infinities are null, so that any reader takes it."""
    import orjson

    try:
        sys.stdout.write(orjson.dumps(data, option=orjson.OPT_INDENT_2).decode() + "\n")
    except (TypeError, orjson.JSONEncodeError):  # lone surrogates, integers beyond 64 bits
        sys.stdout.write(json.dumps(data, indent=2, default=str) + "\n")
