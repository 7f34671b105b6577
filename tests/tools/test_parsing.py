"""Parsing Python text while other threads do the same."""

from __future__ import annotations

import ast
import contextlib
import gc
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from tools.calculator import evaluate
from tools.code.source import with_last_expression

EXPRESSION = " + ".join(["(1 + 2) * 3"] * 30)


@pytest.fixture
def busy_threads() -> Iterator[None]:
    """Collect garbage all the time, with a callback amid which other threads run; one of them parses."""
    before, interval = gc.get_threshold(), sys.getswitchinterval()
    ended = threading.Event()

    def callback(phase: str, info: dict[str, int]) -> None:
        sum(range(200))

    def parse() -> None:
        while not ended.is_set():
            with contextlib.suppress(SystemError):
                ast.parse(EXPRESSION)

    other = threading.Thread(target=parse)
    gc.callbacks.append(callback)
    gc.set_threshold(20, 2, 2)
    sys.setswitchinterval(1e-5)
    other.start()
    try:
        yield
    finally:
        ended.set()
        other.join()
        gc.callbacks.remove(callback)
        gc.set_threshold(*before)
        sys.setswitchinterval(interval)


def at_depth(calls: int, function: Callable[[], object]) -> object:
    return function() if calls == 0 else at_depth(calls - 1, function)


@pytest.mark.usefixtures("busy_threads")
@pytest.mark.parametrize("parse", [lambda: evaluate(EXPRESSION), lambda: with_last_expression(EXPRESSION)])
def test_what_other_threads_parse_disturbs_nothing(parse: Callable[[], object]) -> None:
    expected = parse()
    errors: list[BaseException] = []

    def work(depth: int) -> None:
        try:
            for _ in range(100):
                assert at_depth(depth, parse) == expected
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=work, args=(depth,)) for depth in (0, 50, 150)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
