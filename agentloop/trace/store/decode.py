"""Read rows of a table back as records, to the bit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa

from agentloop.columns import Logprobs, LossMask, TokenIds, Versions
from agentloop.errors import TokenLawError
from agentloop.faults import Fault
from agentloop.trace import arrays
from agentloop.trace.record import TraceRecord
from agentloop.trace.store.encode import INTEGERS, MAPS, NUMBERS, TEXTS
from agentloop.trace.store.exact_json import load
from agentloop.trace.store.images import ImageFolder
from agentloop.trace.store.tokens import restore_tokens
from agentloop.types import EpisodeStatus, MalformedCall, Span, StepReward, StopReason, ToolCall, Trajectory, Turn

_COLUMNS: dict[str, Callable[[Any], Any]] = {
    "token_ids": TokenIds,
    "loss_mask": LossMask,
    "logprobs": Logprobs,
    "versions": Versions,
}
_FIELDS = {f.name for f in fields(Trajectory)}
_REQUIRED = ("step", "split", "version", "part", "parts", "group_id", "sample_index")
_RECORD = ("step", "split", "version", "part", "parts", "row")


def decode(table: pa.Table, images: ImageFolder) -> list[TraceRecord]:
    """Return the records of a table.

    Raises:
        KeyError, ValueError, TypeError: it does not have the columns of `schema.SCHEMA`.
    """
    scalars = {name: table.column(name).to_pylist() for name in (*_RECORD, *TEXTS, *NUMBERS, *INTEGERS, *_TEXT_COLUMNS)}
    maps = {name: table.column(name).to_pylist() for name in MAPS}
    digests = table.column("images").to_pylist()
    tokens = _Tokens(table)

    for name in _REQUIRED:
        if None in scalars[name]:
            raise ValueError(f"{name} is null")

    records = []
    for i in range(len(table)):
        values: dict[str, Any] = {name: scalars[name][i] for name in (*TEXTS, *NUMBERS, *INTEGERS)}
        values |= {name: dict(maps[name][i] or ()) for name in MAPS}
        values |= {name: read(load(scalars[name][i] or "[]")) for name, read in _READERS.items()}
        values["messages"] = images.located(load(scalars["messages"][i] or "[]"))
        values["images"] = [images.reference(digest) for digest in digests[i] or ()]
        columns = tokens.row(i)
        other = load(text) if (text := scalars["other"][i]) else {}
        values |= dict(zip(_COLUMNS, columns, strict=True))
        for name, value in other.items():
            if name in ("messages", "images"):
                continue  # never written there; only their columns are looked through for paths
            values[name] = _column(name, value) if name in _COLUMNS else value

        known = {name: value for name, value in values.items() if name in _FIELDS}
        known["status"] = _member(EpisodeStatus, known["status"])
        known["stop_reason"] = _member(StopReason, known["stop_reason"])
        mask = np.asarray(columns[1], dtype=bool)
        records.append(
            TraceRecord(
                **{name: scalars[name][i] for name in _RECORD},
                trajectory=Trajectory(**known),
                advantages=tokens.spread("advantages", i, mask, 0.0),
                trainer_logprobs=tokens.spread("trainer_logprobs", i, mask, np.nan),
            )
        )
    return records


def read_turns(items: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Return turns from their JSON form."""
    return [
        _make(
            Turn,
            turn,
            stop_reason=_member(StopReason, turn["stop_reason"]),
            tool_calls=[_make(ToolCall, call) for call in turn.get("tool_calls", ())],
            malformed_calls=[_make(MalformedCall, call) for call in turn.get("malformed_calls", ())],
        )
        for turn in items
    ]


_READERS: dict[str, Callable[[Any], list[Any]]] = {
    "turns": read_turns,
    "step_rewards": lambda items: [_make(StepReward, item) for item in items],
    "faults": lambda items: [_make(Fault, item) for item in items],
    "spans": lambda items: [_make(Span, item) for item in items],
}
_TEXT_COLUMNS = (*_READERS, "messages", "other")


@functools.cache
def _names(kind: type) -> frozenset[str]:
    return frozenset(f.name for f in fields(kind))


def _make(kind: type, item: Mapping[str, Any], **given: Any) -> Any:
    """Make a dataclass from its JSON form; keys that this version does not know are left out."""
    known = _names(kind)
    if not known.issuperset(item):
        item = {key: value for key, value in item.items() if key in known}
    return kind(**{**item, **given}) if given else kind(**item)


def _member(kind: Any, value: Any) -> Any:
    """Return a member of an enumeration; a value that it does not have stays as it is."""
    try:
        return kind(value)
    except ValueError:
        return value


def _column(name: str, values: list[Any]) -> Any:
    """Return an irregular column, compact where its class holds the entries."""
    try:
        return _COLUMNS[name](values)
    except (TokenLawError, TypeError, ValueError, OverflowError):
        return values


class _Tokens:
    """The token columns of a table, without a Python object for each number."""

    def __init__(self, table: pa.Table) -> None:
        self._lists = {
            name: _NumberLists(table.column(name))
            for name in ("token_ids", "logprobs", "logprobs64", "trainer_logprobs", "advantages")
        }
        self._spans = _NumberLists(table.column("sampled_spans"))
        self._starts, self._ends, self._versions = map(self._spans.field, ("start", "end", "version"))

    def row(self, i: int) -> tuple[TokenIds, LossMask, Logprobs, Versions]:
        """Return the columns of a row; of an irregular one, only its ids."""
        lists = self._lists["logprobs"] if self._lists["logprobs"].has(i) else self._lists["logprobs64"]
        spans = self._spans.bounds(i)
        return restore_tokens(
            self._lists["token_ids"].row(i),
            self._starts[spans],
            self._ends[spans],
            self._versions[spans],
            lists.row(i),
            lists.nulls(i),
        )

    def spread(self, name: str, i: int, mask: np.ndarray, empty: float) -> np.ndarray | None:
        """Return numbers of sampled tokens as a column over all tokens; None: the row has none."""
        lists = self._lists[name]
        if not lists.has(i):
            return None
        column = np.full(len(mask), empty, dtype=np.float32)
        column[mask] = lists.row(i)
        return column


class _NumberLists:
    """A column of lists in one piece. Of all rows, it is converted once."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        joined = column.combine_chunks()
        if isinstance(joined, pa.ChunkedArray):  # a table without rows
            joined = joined.chunk(0) if joined.num_chunks else pa.nulls(0, column.type)
        self._offsets = joined.offsets.to_pylist()
        self._values = joined.values
        self._absent = joined.is_null().to_pylist() if joined.null_count else None

    def has(self, i: int) -> bool:
        """Whether a row has a list."""
        return self._absent is None or not self._absent[i]

    def bounds(self, i: int) -> slice:
        """Return where the entries of a row are among those of all."""
        return slice(self._offsets[i], self._offsets[i + 1])

    def row(self, i: int) -> np.ndarray:
        """Return the numbers of a row."""
        return self._numbers[self.bounds(i)]

    def nulls(self, i: int) -> np.ndarray | None:
        """Return which numbers of a row are null; None if none is."""
        if not self._values.null_count:
            return None
        found = self._nulls[self.bounds(i)]
        return found if found.any() else None

    def field(self, name: str) -> list[Any]:
        """Return a field of the entries of all rows."""
        values: list[Any] = self._values.field(name).to_pylist()
        return values

    @functools.cached_property
    def _numbers(self) -> np.ndarray:
        return arrays.to_numpy(self._values)

    @functools.cached_property
    def _nulls(self) -> np.ndarray:
        return arrays.null_flags(self._values)
