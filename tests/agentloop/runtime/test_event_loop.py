"""Event loop and garbage collector of a process for agent loops."""

from __future__ import annotations

import gc

import pytest

from agentloop.runtime.event_loop import COLLECT_EVERY, run_loops


def test_the_collector_looks_seldom_while_loops_run_and_as_before_afterwards() -> None:
    before = gc.get_threshold()

    async def main(fail: bool) -> tuple[int, int, int]:
        assert gc.get_threshold() == COLLECT_EVERY
        if fail:
            raise KeyError("a bug")
        return gc.get_threshold()

    assert run_loops(main(False)) == COLLECT_EVERY
    with pytest.raises(KeyError, match="a bug"):
        run_loops(main(True))
    assert gc.get_threshold() == before
