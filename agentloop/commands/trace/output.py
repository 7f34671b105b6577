"""The file that a command writes: whether it is free, and named like its content."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agentloop.errors import TraceError
from agentloop.files import is_dir, is_file
from agentloop.text import clean

LINES = (".jsonl", ".ndjson")
SUFFIXES: dict[str, tuple[str, ...]] = {
    "jsonl": LINES,
    "parquet": (".parquet", ".pq"),
    "atif": (*LINES, ".json"),
    "messages": LINES,
    "sft": LINES,
}
"""Format -> suffixes of its files."""

KNOWN = frozenset(suffix for names in SUFFIXES.values() for suffix in names) | frozenset(
    (".csv", ".tsv", ".arrow", ".feather", ".yaml", ".yml", ".gz", ".bz2", ".xz", ".zst", ".zip")
)
"""Suffixes that say what a file holds. Programs choose their reader by them."""


def check_out(out: Path, suffixes: Sequence[str], what: str, *, force: bool) -> None:
    """Check the file of `--out`. A suffix that names no form of data may be anything.

    Args:
        suffixes: that fit the content.
        what: names the content.
        force: an existing file may be replaced.

    Raises:
        TraceError: its suffix is that of another form, or it exists.
    """
    suffix = out.suffix.lower()
    if suffix in KNOWN and suffix not in suffixes:
        stem = out
        while stem.suffix.lower() in KNOWN:
            stem = stem.with_suffix("")
        name = clean(stem.with_name(stem.name + suffixes[0]), 300)
        formats = [form for form, fitting in SUFFIXES.items() if suffix in fitting]
        other = f", or choose --format {' or '.join(formats)}" if formats and what.startswith("--format") else ""
        raise TraceError(
            f"{what} writes {'JSON lines' if suffixes[0] == LINES[0] else 'parquet'}, and {clean(out, 300)} is named "
            f"{suffix}",
            f"give --out {name}{other}",
        )
    if not force and (is_file(out) or is_dir(out)):
        raise TraceError(f"{clean(out, 300)} exists", "give another --out, or replace it with --force")
