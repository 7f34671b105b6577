"""Parse Python text beside other threads."""

from __future__ import annotations

import ast
import contextlib
import gc
import threading
from collections.abc import Iterator
from typing import Literal, cast, overload

ATTEMPTS = 20

_one_at_a_time = threading.Lock()


@overload
def parse(code: str, mode: Literal["exec"] = "exec") -> ast.Module: ...
@overload
def parse(code: str, mode: Literal["eval"]) -> ast.Expression: ...
def parse(code: str, mode: Literal["exec", "eval"] = "exec") -> ast.Module | ast.Expression:
    """Return what `ast.parse` returns, also while other threads parse.

    Python 3.11 and 3.12 count the depth of the tree that they build for the whole interpreter: a
    collection of garbage amid it lets other threads run, and if one of them parses as well (so does
    `inspect.signature`, for instance at the import of numpy.ma), each can end in a SystemError
    (https://github.com/python/cpython/issues/106905). Calls of this function wait for each other,
    collect no garbage, and are repeated should they meet a call of `ast.parse` in another thread
    all the same.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: as `ast.parse`.
        SystemError: no attempt was left alone by other threads.
    """
    with _one_at_a_time, _uncollected():
        for _ in range(ATTEMPTS - 1):
            try:
                return cast("ast.Module | ast.Expression", ast.parse(code, mode=mode))
            except SystemError:
                continue
        return cast("ast.Module | ast.Expression", ast.parse(code, mode=mode))


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Collect no garbage within the block."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
