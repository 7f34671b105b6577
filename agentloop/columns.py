"""Compact columns of a trajectory: about 14 bytes a token, where Python lists take about 50.

A trajectory has four columns of one length, one entry a token:

    column      class       stored as                                         bytes
    token_ids   TokenIds    int32                                             4 a token
    loss_mask   LossMask    one byte                                          1 a token
    logprobs    Logprobs    float64; one NaN bit pattern stands for None      8 a token
    versions    Versions    runs: where each one ends, and its version        about 12 a run

Each reads like a list: `len`, an index, a slice (a new list), iteration, `==` with a list, `in`,
`count`, `index`. Entries cannot be changed, only appended. `numpy.asarray(column)` copies a column
into an array.

Logprobs are not rounded to float32: they are the engine's own to the bit, and the wire carries
doubles. Worker processes that call reward functions load this module, so it does not import numpy
at the top.
"""

from __future__ import annotations

from abc import abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby, pairwise, repeat
from typing import TYPE_CHECKING, Any, Self, TypeVar, overload

from agentloop.errors import LawRule, TokenLawError

if TYPE_CHECKING:
    import numpy as np

Buffer = bytes | bytearray | memoryview

T = TypeVar("T")

NO_LOGPROB_BITS = 0x7FF8_0000_6E6F_6E65
"""Bits of the NaN that stands for None in `Logprobs`. Arithmetic does not produce this payload."""

_NO_LOGPROB_BYTES = array("Q", [NO_LOGPROB_BITS]).tobytes()
_NO_LOGPROB = array("d", _NO_LOGPROB_BYTES)[0]


class Column(Sequence[T]):
    """Base of the four columns: an append-only sequence that equals the list of its entries."""

    __slots__ = ()

    @abstractmethod
    def tolist(self, begin: int = 0, end: int | None = None) -> list[T]:
        """Return the entries `[begin:end]` as a new list; `0 <= begin <= end <= len(self)`."""

    @abstractmethod
    def _entry(self, index: int) -> T:
        """Return one entry; a negative index counts from the end."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if not isinstance(index, slice):
            return self._entry(index)

        begin, end, step = index.indices(len(self))
        return self.tolist(begin, max(begin, end)) if step == 1 else self.tolist()[index]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Column):
            return len(self) == len(other) and self.tolist() == other.tolist()
        if isinstance(other, list):
            return len(self) == len(other) and self.tolist() == other
        return NotImplemented

    def __copy__(self) -> Self:
        # copy.copy would share the storage, so that the copy grows with the original.
        return type(self)(self)  # type: ignore[call-arg]  # every column is made from its entries

    __hash__ = None  # type: ignore[assignment]  # a column grows, so it cannot have a lasting hash

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.tolist()!r})"


class TokenIds(Column[int]):
    """Token ids, 4 bytes each.

    Raises:
        TokenLawError: an id does not fit into 32 bits.
        TypeError: an id is not an integer.
    """

    __slots__ = ("_data",)

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._data = _int32(ids)

    @classmethod
    def from_array(cls, ids: np.ndarray) -> TokenIds:
        """Return a copy of an int32 array."""
        return cls.from_bytes(_bytes(ids, "int32"))

    @classmethod
    def from_bytes(cls, data: Buffer) -> TokenIds:
        """Return the column of `view`."""
        column = cls()
        column._data.frombytes(data)
        return column

    def view(self) -> memoryview:
        """Return the ids as int32, without a copy. The column cannot grow while it is held."""
        return memoryview(self._data)

    def extend(self, ids: Iterable[int]) -> None:
        """Append ids; if one is refused, append none."""
        if isinstance(ids, list):  # the path of every turn: one pass, without a copy in between
            try:
                self._data.fromlist(ids)
            except OverflowError as exc:
                raise _too_wide(exc) from exc
        else:
            self._data.extend(_int32(ids))

    def truncate(self, tokens: int) -> None:
        """Drop all entries after the first `tokens`: undo an append whose sibling was refused."""
        del self._data[tokens:]

    def tolist(self, begin: int = 0, end: int | None = None) -> list[int]:
        return self._data[begin:end].tolist()

    def _entry(self, index: int) -> int:
        return self._data[index]

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[int]:
        return iter(self._data)

    def __sizeof__(self) -> int:
        return object.__sizeof__(self) + self._data.__sizeof__()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return _copy(self._data, dtype, copy)


class LossMask(Column[int]):
    """Loss mask, one byte a token.

    Raises:
        TypeError, ValueError: an entry is not an integer in 0..255; only 0 and 1 are lawful.
    """

    __slots__ = ("_data",)

    def __init__(self, mask: Iterable[int] = ()) -> None:
        self._data = bytearray(iter(mask))  # iter: bytearray(5) would be five zeros

    @classmethod
    def from_array(cls, mask: np.ndarray) -> LossMask:
        """Return a copy of a uint8 array."""
        return cls.from_bytes(_bytes(mask, "uint8"))

    @classmethod
    def from_bytes(cls, data: Buffer) -> LossMask:
        """Return the column of `view`."""
        column = cls()
        column._data += data
        return column

    def view(self) -> memoryview:
        """Return the mask as uint8, without a copy. The column cannot grow while it is held."""
        return memoryview(self._data)

    def extend(self, mask: int, tokens: int) -> None:
        """Append `mask` for a number of tokens.

        Raises:
            ValueError: the number is negative, or `mask` is not in 0..255.
        """
        self._data += bytes((mask,)) * _count(tokens)

    def tolist(self, begin: int = 0, end: int | None = None) -> list[int]:
        return list(self._data[begin:end])

    def count(self, value: Any) -> int:
        # bytearray.count raises for what no entry can be, and counts the parts of a bytes value.
        return self._data.count(value) if isinstance(value, int) and 0 <= value < 256 else super().count(value)

    def _entry(self, index: int) -> int:
        return self._data[index]

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[int]:
        return iter(self._data)

    def __sizeof__(self) -> int:
        return object.__sizeof__(self) + self._data.__sizeof__()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return _copy(array("B", self._data), dtype, copy)


class Logprobs(Column["float | None"]):
    """Logprobs, 8 bytes each; None for a token that was not sampled. As a numpy array, None is NaN.

    Raises:
        TypeError: an entry is neither a number nor None.
    """

    __slots__ = ("_data",)

    def __init__(self, logprobs: Iterable[float | None] = ()) -> None:
        self._data = _float64(logprobs)

    @classmethod
    def from_bits(cls, bits: np.ndarray) -> Logprobs:
        """Return the column of uint64 bit patterns, as `bits` returns them."""
        return cls.from_bytes(_bytes(bits, "uint64"))

    @classmethod
    def from_bytes(cls, data: Buffer) -> Logprobs:
        """Return the column of `view`."""
        column = cls()
        column._data.frombytes(data)
        return column

    def view(self) -> memoryview:
        """Return the entries as float64, without a copy; None as its bit pattern. The column cannot
        grow while it is held."""
        return memoryview(self._data)

    def extend(self, logprobs: Iterable[float | None]) -> None:
        """Append logprobs; if one is refused, append none."""
        if isinstance(logprobs, list):
            try:
                self._data.fromlist(logprobs)  # a list of floats: one pass, without a copy in between
                return
            except TypeError:  # there is a None, or an entry that is refused below
                pass
        self._data.extend(_float64(logprobs))

    def extend_none(self, tokens: int) -> None:
        """Append None for a number of tokens.

        Raises:
            ValueError: the number is negative.
        """
        self._data.frombytes(_NO_LOGPROB_BYTES * _count(tokens))

    def bits(self) -> array[int]:
        """Return a copy of the entries as 64-bit patterns, which tell None from any other NaN."""
        return array("Q", self._data.tobytes())

    def tolist(self, begin: int = 0, end: int | None = None) -> list[float | None]:
        part = self._data[begin:end]
        bits = array("Q", part.tobytes())
        return [None if pattern == NO_LOGPROB_BITS else value for pattern, value in zip(bits, part, strict=True)]

    def _entry(self, index: int) -> float | None:
        value = self._data[index]
        if value == value or array("d", (value,)).tobytes() != _NO_LOGPROB_BYTES:
            return value
        return None

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[float | None]:
        return iter(self.tolist())

    def __sizeof__(self) -> int:
        return object.__sizeof__(self) + self._data.__sizeof__()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return _copy(self._data, dtype, copy)


class Versions(Column["int | None"]):
    """Policy versions as runs of equal entries; None for tokens that were not sampled.

    Example: `[None, None, 3, 3, 4]` has the runs `(0, 2, None), (2, 4, 3), (4, 5, 4)`.
    """

    __slots__ = ("_ends", "_values")

    def __init__(self, versions: Iterable[int | None] = ()) -> None:
        self._ends = array("i")
        self._values: list[int | None] = []
        self.extend(versions)

    def extend(self, versions: Iterable[int | None]) -> None:
        """Append versions, token by token."""
        versions = versions if isinstance(versions, list) else list(versions)
        if versions and versions.count(versions[0]) == len(versions):  # the usual turn: one version
            self.extend_run(versions[0], len(versions))
            return

        for version, run in groupby(versions):
            self.extend_run(version, sum(1 for _ in run))

    def extend_run(self, version: int | None, tokens: int) -> None:
        """Append one version for a number of tokens.

        Raises:
            ValueError: the number is negative.
        """
        if not _count(tokens):
            return

        ends, values = self._ends, self._values
        if values and values[-1] == version:
            ends[-1] += tokens
        else:
            ends.append(ends[-1] + tokens if ends else tokens)
            values.append(version)

    @classmethod
    def from_ends(cls, ends: Buffer, values: list[int | None]) -> Versions:
        """Return the column of `view` and `values`.

        Raises:
            ValueError: there is not one value for each run.
        """
        column = cls()
        column._ends.frombytes(ends)
        column._values = values
        if len(column._ends) != len(values):
            raise ValueError(f"{len(values)} versions for {len(column._ends)} runs")
        return column

    def view(self) -> memoryview:
        """Return where each run ends, as int32, without a copy. The column cannot grow while it is
        held."""
        return memoryview(self._ends)

    @property
    def values(self) -> list[int | None]:
        """The version of each run."""
        return list(self._values)

    def runs(self) -> Iterator[tuple[int, int, int | None]]:
        """Yield (start, end, version) of each run, in order."""
        for (start, end), version in zip(pairwise((0, *self._ends)), self._values, strict=True):
            yield start, end, version

    def tolist(self, begin: int = 0, end: int | None = None) -> list[int | None]:
        end = len(self) if end is None else end
        found: list[int | None] = []
        for number in range(bisect_right(self._ends, begin), len(self._values)):
            last = min(self._ends[number], end)
            found += [self._values[number]] * (last - begin)
            begin = last
            if last == end:
                break
        return found

    def _entry(self, index: int) -> int | None:
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} tokens")
        return self._values[bisect_right(self._ends, position)]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[int | None]:
        return chain.from_iterable(repeat(version, end - start) for start, end, version in self.runs())

    def __sizeof__(self) -> int:
        return object.__sizeof__(self) + self._ends.__sizeof__() + self._values.__sizeof__()


def _count(tokens: int) -> int:
    if tokens < 0:
        raise ValueError(f"cannot append {tokens} tokens")
    return tokens


def _int32(ids: Iterable[int]) -> array[int]:
    if isinstance(ids, TokenIds):
        return ids._data[:]
    try:
        # array would read the bytes of a bytes object as its memory, and not as entries.
        return array("i", iter(ids) if isinstance(ids, bytes | bytearray) else ids)
    except OverflowError as exc:
        raise _too_wide(exc) from exc


def _too_wide(exc: OverflowError) -> TokenLawError:
    return TokenLawError(f"a token id does not fit into 32 bits: {exc}", rule=LawRule.COLUMNS)


def _float64(logprobs: Iterable[float | None]) -> array[float]:
    if isinstance(logprobs, Logprobs):
        return logprobs._data[:]
    logprobs = logprobs if isinstance(logprobs, list) else list(logprobs)
    try:
        return array("d", logprobs)
    except TypeError:  # there is a None, or an entry that is refused below
        return array("d", [_NO_LOGPROB if value is None else value for value in logprobs])


def _bytes(values: np.ndarray, dtype: str) -> bytes:
    if values.dtype != dtype or values.ndim != 1:
        raise TypeError(f"an array of {values.dtype} with {values.ndim} dimensions is not one of {dtype} with 1")
    return values.tobytes()


def _copy(data: array[Any], dtype: Any, copy: bool | None) -> np.ndarray:
    """Copy a buffer into an array: a view would forbid the column to grow, and could be written
    to."""
    import numpy as np

    if copy is False:
        raise ValueError("a column cannot be viewed without a copy: leave out copy=False")
    return np.array(memoryview(data), dtype=dtype)
