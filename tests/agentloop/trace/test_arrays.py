"""Columns of arrow, compared with those that `pa.array` makes, and with `to_numpy`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentloop.trace import arrays
from tests.agentloop.trace.store import support

TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
FLOATS = st.floats()
INTEGERS = st.integers(-(2**31), 2**31 - 1)


def nullable(values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.none() | values, max_size=20)


COLUMNS = st.one_of(
    st.tuples(nullable(TEXT), st.just(pa.string())),
    st.tuples(nullable(INTEGERS), st.sampled_from([pa.int32(), pa.int64()])),
    st.tuples(nullable(FLOATS), st.just(pa.float64())),
    st.tuples(
        nullable(st.lists(st.tuples(TEXT, st.none() | FLOATS), max_size=3)),
        st.just(pa.map_(pa.string(), pa.float64())),
    ),
)


@settings(deadline=None)
@given(COLUMNS)
def test_a_column_is_what_arrow_makes_of_it(column: tuple[list[Any], pa.DataType]) -> None:
    values, kind = column
    made, expected = arrays.column(values, kind), pa.array(values, kind)
    made.validate(full=True)
    assert made.type == expected.type and made.null_count == expected.null_count
    assert repr(made.to_pylist()) == repr(expected.to_pylist())  # NaN is not equal to itself


@settings(deadline=None)
@given(st.lists(st.lists(TEXT, max_size=3), max_size=10))
def test_lists_of_texts_are_what_arrow_makes_of_them(values: list[list[str]]) -> None:
    kind = pa.list_(pa.field("element", pa.string()))
    made = arrays.text_lists(values, kind)
    made.validate(full=True)
    assert made.equals(pa.array(values, kind))


@settings(deadline=None)
@given(
    st.one_of(
        nullable(INTEGERS).map(lambda values: pa.array(values, pa.int64())),
        nullable(FLOATS).map(lambda values: pa.array(values, pa.float64())),
        nullable(st.floats(width=32)).map(lambda values: pa.array(values, pa.float32())),
        st.lists(st.booleans(), max_size=20).map(lambda values: pa.array(values, pa.bool_())),
    ),
    st.integers(0, 12),
)
def test_numbers_are_what_arrow_makes_of_them(array: pa.Array, start: int) -> None:
    part = array[start:]
    expected = np.asarray(part.to_numpy(zero_copy_only=False))
    made = arrays.to_numpy(part)
    assert made.dtype == expected.dtype or not len(part)
    np.testing.assert_array_equal(made, expected)
    np.testing.assert_array_equal(arrays.null_flags(part), part.is_null().to_numpy(zero_copy_only=False))


def test_numbers_of_other_types_are_read(tmp_path: Path) -> None:
    decimals = pa.array([1, None], pa.decimal128(5))
    assert [str(value) for value in arrays.to_numpy(decimals)] == ["1", "None"]


@pytest.mark.parametrize("kind", [pa.int64(), pa.float32(), pa.bool_()])
def test_an_array_without_entries_has_none(kind: pa.DataType) -> None:
    assert arrays.to_numpy(pa.nulls(0, kind)).shape == arrays.null_flags(pa.nulls(0, kind)).shape == (0,)


def test_a_column_of_nulls_alone_has_nulls() -> None:
    assert arrays.null_flags(pa.nulls(3)[1:]).tolist() == [True, True]


STEP = """
import runpy, sys
from pathlib import Path
from agentloop.trace.index import TraceIndex
from agentloop.trace.store import TraceStore

step_records = runpy.run_path(sys.argv[2])["step_records"]
store = TraceStore(Path(sys.argv[1]))
store.write(1, "train", step_records(1, failed={(0, 0)}))
index = TraceIndex(Path(sys.argv[1]))
index.add(1, "train")
index.close()
assert len(store.records(1, "train")) == 8
assert "pandas" not in sys.modules
"""


def test_a_step_is_written_and_indexed_without_pandas(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", STEP, str(tmp_path), support.__file__], check=True)
