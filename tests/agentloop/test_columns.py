"""The compact columns: they read like the lists that they stand for, and take a quarter of the memory."""

from __future__ import annotations

import copy
import itertools
import pickle
import sys
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentloop.columns import NO_LOGPROB_BITS, Column, Logprobs, LossMask, TokenIds, Versions
from agentloop.errors import LawRule, TokenLawError
from agentloop.types import Trajectory

ENTRIES: dict[type[Column[Any]], st.SearchStrategy[Any]] = {
    TokenIds: st.integers(-(2**31), 2**31 - 1),
    LossMask: st.integers(0, 1),
    Logprobs: st.none() | st.floats(allow_nan=False),
    Versions: st.none() | st.integers(0, 2),
}
BOUND = st.none() | st.integers(-12, 12)

every_column = pytest.mark.parametrize("kind", list(ENTRIES))


@every_column
@given(data=st.data())
def test_a_column_reads_like_the_list_of_its_entries(kind: Any, data: st.DataObject) -> None:
    entries = data.draw(st.lists(ENTRIES[kind], max_size=10))
    column = kind(entries)
    assert len(column) == len(entries) and bool(column) == bool(entries)
    assert list(column) == column.tolist() == entries and list(reversed(column)) == entries[::-1]
    assert [column[i] for i in range(-len(entries), len(entries))] == entries + entries
    assert column == entries and entries == column and column == kind(entries)
    assert column != [*entries, 0] and column != tuple(entries) and column != "x"
    for place in (len(entries), -len(entries) - 1):
        with pytest.raises(IndexError):
            column[place]
    where = slice(data.draw(BOUND), data.draw(BOUND), data.draw(st.sampled_from([None, 1, 2, -1])))
    assert column[where] == entries[where] and type(column[where]) is list
    for entry in entries:
        assert entry in column
        assert (column.count(entry), column.index(entry)) == (entries.count(entry), entries.index(entry))
    assert copy.deepcopy(column) == pickle.loads(pickle.dumps(column)) == column
    assert repr(column) == f"{kind.__name__}({entries!r})"


@given(parts=st.lists(st.lists(ENTRIES[Versions], max_size=4), max_size=6))
def test_versions_that_are_appended_in_parts_are_those_of_the_whole(parts: list[list[int | None]]) -> None:
    versions = Versions()
    for part in parts:
        versions.extend(part)
    whole = [version for part in parts for version in part]
    assert versions == whole
    runs = list(versions.runs())
    assert [version for start, end, version in runs for _ in range(start, end)] == whole
    assert all(one[2] != other[2] for one, other in itertools.pairwise(runs))


def test_logprobs_are_kept_to_the_bit_and_none_is_not_nan() -> None:
    values = [-0.1, -1e-300, float("nan"), None, -0.0, -float("inf")]
    logprobs = Logprobs(values)
    assert [v if v is None else v.hex() for v in logprobs] == [v if v is None else float(v).hex() for v in values]
    assert logprobs[2] != logprobs[2] and logprobs[3] is None
    assert [pattern == NO_LOGPROB_BITS for pattern in logprobs.bits()] == [value is None for value in values]
    assert np.isnan(np.asarray(logprobs)).tolist() == [False, False, True, True, False, False]


@every_column
def test_a_column_cannot_be_written_to(kind: Any) -> None:
    column = kind([1, 1])
    with pytest.raises(TypeError):
        column[0] = 0
    with pytest.raises(TypeError):
        del column[0]
    with pytest.raises(TypeError):
        hash(column)
    array = np.asarray(column)
    array[0] = 0
    assert column == [1, 1]


def test_an_array_of_a_column_does_not_stop_it_from_growing() -> None:
    ids = TokenIds([1, 2])
    array = np.asarray(ids)
    ids.extend([3])
    assert ids == [1, 2, 3] and array.tolist() == [1, 2] and array.dtype == np.int32
    with pytest.raises(ValueError, match="without a copy"):
        ids.__array__(copy=False)


def test_what_a_column_cannot_hold_is_refused_and_nothing_is_appended() -> None:
    ids, logprobs = TokenIds([1]), Logprobs([None])
    with pytest.raises(TokenLawError, match="32 bits") as caught:
        ids.extend([2, 2**31])
    assert caught.value.rule is LawRule.COLUMNS
    with pytest.raises(TypeError):
        ids.extend([2, 0.5])  # type: ignore[list-item]
    with pytest.raises(TypeError):
        logprobs.extend([-1.0, "x"])  # type: ignore[list-item]
    with pytest.raises(TypeError):
        LossMask(5)  # type: ignore[arg-type]
    assert ids == [1] and logprobs == [None]


def test_the_json_form_has_lists_whichever_form_the_columns_have() -> None:
    lists: tuple[Any, ...] = ([1, 2, 3], [0, 1, 1], [None, -0.1, -0.25], [None, 3, 3])
    plain = Trajectory(*lists, prompt_length=1)
    compact = Trajectory.from_json(plain.to_json())
    assert compact == plain and orjson.dumps(compact.to_json()) == orjson.dumps(plain.to_json())
    assert [type(getattr(compact, name)) for name in ("token_ids", "loss_mask", "logprobs", "versions")] == [
        TokenIds,
        LossMask,
        Logprobs,
        Versions,
    ]
    assert compact.sampled_tokens == 2 and compact.min_version == 3


def test_a_token_takes_at_most_16_bytes_however_the_columns_grew() -> None:
    ids, mask, logprobs, versions = TokenIds(), LossMask(), Logprobs(), Versions()
    for turn in range(40):
        ids.extend([turn] * 30)
        mask.extend(0, 30)
        logprobs.extend_none(30)
        versions.extend_run(None, 30)
        ids.extend([turn] * 64)
        mask.extend(1, 64)
        logprobs.extend([-0.5] * 64)
        versions.extend([turn] * 64)
    columns: list[Column[Any]] = [ids, mask, logprobs, versions]
    assert {len(column) for column in columns} == {40 * 94}
    assert sum(map(sys.getsizeof, columns)) <= 16 * len(ids)


@pytest.mark.parametrize("column", [TokenIds([1, 2]), LossMask([0, 1]), Logprobs([None, 0.5]), Versions([None, 3])])
def test_a_copy_has_its_own_storage(column: Any) -> None:
    for copied in (copy.copy(column), copy.deepcopy(column)):
        assert type(copied) is type(column) and copied == column
        if isinstance(copied, LossMask):
            copied.extend(1, 2)
        else:
            copied.extend([5, 6])
        assert len(copied) == 4 and len(column) == 2


def test_bytes_are_entries_as_in_a_list() -> None:
    data = b"\x01\x02\x03\x04"
    assert TokenIds(data) == TokenIds(bytearray(data)) == list(data)
    assert LossMask(b"\x00\x01") == [0, 1]


def test_counting_what_no_entry_can_be_gives_zero() -> None:
    mask = LossMask([0, 1, 1])
    for value in ("x", 300, -1, None, b"\x01\x01", 1.5):
        assert mask.count(value) == [0, 1, 1].count(value) == 0  # type: ignore[arg-type]
    assert mask.count(1) == mask.count(True) == mask.count(1.0) == 2


def test_a_negative_number_of_tokens_is_refused() -> None:
    column: Any
    for column, extend in (
        (Versions([3]), lambda c: c.extend_run(3, -1)),
        (LossMask([1]), lambda c: c.extend(1, -1)),
        (Logprobs([0.5]), lambda c: c.extend_none(-1)),
    ):
        with pytest.raises(ValueError, match="cannot append -1 tokens"):
            extend(column)
        assert len(column) == 1
