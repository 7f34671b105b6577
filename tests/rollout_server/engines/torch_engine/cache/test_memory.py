"""Rows of the KV cache's memory: kept while it grows and shrinks, and given back."""

from __future__ import annotations

import psutil
import pytest
import torch

from rollout_server.engines.torch_engine.cache.memory import GrowingRows

CPU = torch.device("cpu")


def rows(most: int = 8, row: tuple[int, ...] = (3, 5), *, reserve: bool = True) -> GrowingRows:
    return GrowingRows(2, row, most, dtype=torch.float32, device=CPU, reserve=reserve)


@pytest.mark.parametrize("reserve", [True, False])
@pytest.mark.parametrize("row", [(3, 5), (1024, 3)])  # smaller than a page, and pages
def test_rows_keep_what_they_hold_while_others_come_and_go(row: tuple[int, ...], reserve: bool) -> None:
    memory = rows(row=row, reserve=reserve)
    expected = torch.zeros(2, 0, *row)
    for before, after in [(0, 2), (2, 6), (6, 3), (3, 8), (8, 1), (1, 4)]:
        keep = min(before, after)
        memory.resize(after, keep)
        kept = memory.tensor[:, :keep]
        assert torch.equal(kept, expected[:, :keep])
        assert torch.isfinite(memory.tensor[:, :after]).all()
        expected = torch.randn(2, after, *row)
        memory.tensor[:, :after] = expected


@pytest.mark.parametrize("reserve", [True, False])
def test_nothing_survives_a_size_of_none(reserve: bool) -> None:
    memory = rows(reserve=reserve)
    memory.resize(8, 0)
    memory.tensor[:] = float("nan")
    memory.resize(0, 0)
    memory.resize(8, 0)
    assert torch.equal(memory.tensor[:, :8], torch.zeros(2, 8, 3, 5))


@pytest.mark.parametrize("reserve", [True, False])
def test_memory_is_taken_when_it_is_written_and_given_back(reserve: bool) -> None:
    size = 2**20  # bytes of a row
    process = psutil.Process()
    before = process.memory_info().rss
    memory = rows(64, (size // 4,), reserve=reserve)
    assert process.memory_info().rss - before < 16 * size
    memory.resize(64, 0)
    memory.tensor[:, :64] = 1.0
    full = process.memory_info().rss
    assert full - before > 100 * size
    memory.resize(4, 4)
    assert full - process.memory_info().rss > 100 * size
    assert torch.equal(memory.tensor[:, :4], torch.ones(2, 4, size // 4))
