"""Write records as rows of a table (`schema.SCHEMA`).

Nothing that a model or a user's code wrote can fail here: what a typed column cannot hold goes into
the JSON text `other`, which wins when the row is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from typing import Any

import numpy as np
import pyarrow as pa

from agentloop.trace import arrays
from agentloop.trace.record import TraceRecord
from agentloop.trace.store.exact_json import dump
from agentloop.trace.store.images import Digests
from agentloop.trace.store.schema import SCHEMA
from agentloop.trace.store.tokens import NO_VERSION, StoredTokens, irregular_columns, store_tokens
from agentloop.types import Trajectory

TOKEN_FIELDS = ("token_ids", "loss_mask", "logprobs", "versions")
TEXTS = (
    "trace_id", "group_id", "task_id", "agent_name", "data_source", "status", "stop_reason", "answer", "error",
    "broken_rule",
)  # fmt: skip
NUMBERS = ("reward", "outcome")
INTEGERS = ("sample_index", "prompt_length")
MAPS = ("reward_parts", "metrics")
JSON = ("turns", "step_rewards", "faults", "spans")
TYPED = {*TOKEN_FIELDS, *TEXTS, *NUMBERS, *INTEGERS, *MAPS, *JSON, "messages", "images"}
"""Fields of a trajectory that have a column; every other field is written into `other`."""

_LATER = [f for f in fields(Trajectory) if f.name not in TYPED]
_INT32, _INT64 = np.iinfo(np.int32), np.iinfo(np.int64)


def encode(records: Sequence[TraceRecord], digests: Digests) -> pa.Table:
    """Return records as a table; images are given to `digests`."""
    rows = _Rows()
    for record in records:
        rows.add(record, digests)
    return rows.table()


class _Rows:
    """The columns of a table while it grows."""

    def __init__(self) -> None:
        self.cells: dict[str, list[Any]] = {
            name: [] for name, kind in zip(SCHEMA.names, SCHEMA.types, strict=True) if not pa.types.is_list(kind)
        }
        self.images: list[list[str]] = []
        self.ids = _Lists(np.int32)
        self.logprobs, self.trainer, self.advantages = _Lists(np.float32), _Lists(np.float32), _Lists(np.float32)
        self.logprobs64 = _Lists(np.float64)
        self.starts, self.ends, self.versions = _Lists(np.int32), _Lists(np.int32), _Lists(np.int64)

    def add(self, record: TraceRecord, digests: Digests) -> None:
        """Append a record."""
        trajectory, other = record.trajectory, dict[str, Any]()
        self._add_record(record)
        self._add_scalars(trajectory, other)
        self._add_tokens(record, other)

        cells = self.cells
        turns, spans = trajectory.turns, trajectory.spans
        cells["turns"].append(dump(turns, sum([_nones(t.reasoning, t.prompt_digest, t.sampled_digest) for t in turns])))
        cells["spans"].append(dump(spans, sum([_nones(span.parent_id, span.error) for span in spans])))
        cells["step_rewards"].append(dump(trajectory.step_rewards))
        cells["faults"].append(dump(trajectory.faults))
        cells["messages"].append(dump([digests.message(message) for message in trajectory.messages]))
        self.images.append([digests.of(image) for image in trajectory.images])
        for field in _LATER:
            value = getattr(trajectory, field.name)
            if value != (field.default if field.default is not MISSING else None):
                other[field.name] = value
        cells["other"].append(dump(other) if other else None)

    def _add_record(self, record: TraceRecord) -> None:
        cells = self.cells
        cells["step"].append(record.step)
        cells["split"].append(record.split)
        cells["version"].append(record.version)
        cells["part"].append(record.part)
        cells["parts"].append(record.parts)
        cells["row"].append(record.row)

    def _add_scalars(self, trajectory: Trajectory, other: dict[str, Any]) -> None:
        for names, convert in (
            (TEXTS, text_cell),
            (NUMBERS, number_cell),
            (INTEGERS, integer_cell),
            (MAPS, numbers_cell),
        ):
            for name in names:
                value = getattr(trajectory, name)
                stored, exact = convert(value)
                self.cells[name].append(stored)
                if not exact:
                    other[name] = value
        turns = trajectory.turns
        self.cells["turn_count"].append(len(turns))
        self.cells["tool_calls"].append(sum(len(turn.tool_calls) for turn in turns))
        self.cells["malformed_calls"].append(sum(len(turn.malformed_calls) for turn in turns))

    def _add_tokens(self, record: TraceRecord, other: dict[str, Any]) -> None:
        t = record.trajectory
        tokens = store_tokens(t.token_ids, t.loss_mask, t.logprobs, t.versions)
        if tokens is None:
            columns = irregular_columns(t)
            other |= columns
            tokens = _shown(columns)
        cells = self.cells
        cells["length"].append(len(tokens.ids))
        cells["sampled"].append(len(tokens.logprobs))
        known = tokens.versions[tokens.versions != NO_VERSION]
        cells["min_version"].append(int(known.min()) if len(known) else None)
        cells["max_version"].append(int(known.max()) if len(known) else None)

        self.ids.add(tokens.ids)
        self.starts.add(tokens.starts)
        self.ends.add(tokens.ends)
        self.versions.add(tokens.versions, tokens.versions == NO_VERSION)
        self.logprobs.add(tokens.logprobs.astype(np.float32) if tokens.single else None, tokens.missing)
        self.logprobs64.add(None if tokens.single else tokens.logprobs, tokens.missing)
        self.trainer.add(_sampled(record.trainer_logprobs, tokens.mask))
        self.advantages.add(_sampled(record.advantages, tokens.mask))

    def table(self) -> pa.Table:
        """Return the rows."""
        spans = pa.StructArray.from_arrays(
            [self.starts.values(), self.ends.values(), self.versions.values()],
            fields=list(SCHEMA.field("sampled_spans").type.value_type),
        )
        lists = {
            "token_ids": self.ids.array(),
            "sampled_spans": self.starts.array(spans),
            "logprobs": self.logprobs.array(),
            "logprobs64": self.logprobs64.array(),
            "trainer_logprobs": self.trainer.array(),
            "advantages": self.advantages.array(),
            "images": arrays.text_lists(self.images, SCHEMA.field("images").type),
        }
        columns = [
            lists[field.name] if field.name in lists else arrays.column(self.cells[field.name], field.type)
            for field in SCHEMA
        ]
        return pa.table(columns, schema=SCHEMA)


class _Lists:
    """A column of number lists, without a Python object for each number."""

    def __init__(self, dtype: Any) -> None:
        self._dtype = dtype
        self._parts: list[np.ndarray] = []
        self._nulls: list[np.ndarray | None] = []
        self._lengths: list[int] = []
        self._absent: list[bool] = []

    def add(self, numbers: np.ndarray | None, null: np.ndarray | None = None) -> None:
        """Append a list; None: the row has none. `null` marks entries without a number."""
        self._absent.append(numbers is None)
        part = numbers if numbers is not None else np.zeros(0, dtype=self._dtype)
        self._lengths.append(len(part))
        self._parts.append(part)
        self._nulls.append(null if numbers is not None else None)

    def values(self) -> pa.Array:
        """Return the numbers of all lists, one after another."""
        joined = np.concatenate(self._parts) if self._parts else np.zeros(0, dtype=self._dtype)
        nulls = [null for null in self._nulls if null is not None and null.any()]
        if not nulls:
            return arrays.numbers(joined)
        pairs = zip(self._nulls, self._lengths, strict=True)
        mask = np.concatenate([np.zeros(length, dtype=bool) if null is None else null for null, length in pairs])
        return arrays.numbers(joined, mask)

    def array(self, values: pa.Array | None = None) -> pa.Array:
        """Return the lists; `values` replaces the numbers."""
        offsets = np.concatenate(([0], np.cumsum(self._lengths))).astype(np.int32)
        absent = arrays.flags(np.array(self._absent)) if any(self._absent) else None
        return pa.ListArray.from_arrays(
            arrays.numbers(offsets), self.values() if values is None else values, mask=absent
        )


def _sampled(column: np.ndarray | None, mask: np.ndarray) -> np.ndarray | None:
    """Return the entries of sampled tokens, float32."""
    if column is None:
        return None
    column = np.asarray(column, dtype=np.float32)
    if column.shape != mask.shape:
        raise ValueError(f"a column of shape {column.shape} does not belong to {len(mask)} tokens")
    kept: np.ndarray = column[mask]
    return kept


def _shown(columns: dict[str, list[Any]]) -> StoredTokens:
    """Return what the typed columns show of an irregular trajectory: its ids, without logprobs."""
    ids = [token if type(token) is int and 0 <= token <= _INT32.max else 0 for token in columns["token_ids"]]
    none = np.zeros(0, dtype=np.int32)
    return StoredTokens(
        np.array(ids, dtype=np.int32), none, none, none.astype(np.int64), none.astype(np.float64), None, True,
        np.zeros(len(ids), dtype=bool),
    )  # fmt: skip


def _nones(*values: Any) -> int:
    return values.count(None)


# Each returns what a typed column holds of a value, and whether that is the value exactly.


def text_cell(value: Any) -> tuple[str | None, bool]:
    if value is None or (isinstance(value, str) and value.isascii()):
        return value, True
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode(), False
    return text, isinstance(value, str)


def number_cell(value: Any) -> tuple[float | None, bool]:
    if value is None or type(value) is float:
        return value, True
    try:
        return float(value), False
    except (TypeError, ValueError, OverflowError):
        return None, False


def integer_cell(value: Any) -> tuple[int, bool]:
    if type(value) is int and _INT64.min <= value <= _INT64.max:
        return value, True
    return 0, False


def numbers_cell(value: Any) -> tuple[list[tuple[str, float | None]], bool]:
    if not isinstance(value, dict):
        return [], False
    exact, pairs = True, []
    for key, number in value.items():
        name, named = text_cell(key)
        stored, same = number_cell(number)
        exact = exact and named and same and isinstance(key, str)
        pairs.append((name or "", stored))
    return pairs, exact


def estimate(records: Iterable[TraceRecord]) -> int:
    """Return about how many bytes records take before compression."""
    total = 0
    for record in records:
        t = record.trajectory
        tokens = len(t.token_ids)
        total += 500 + tokens * 8 + sum(len(turn.text) for turn in t.turns)
        total += tokens * 4 * ((record.trainer_logprobs is not None) + (record.advantages is not None))
        total += sum(len(content) for m in t.messages if isinstance(content := m.get("content"), str))
    return total
