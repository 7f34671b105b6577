"""Shared prefixes are computed once, and reusing them changes no result."""

from __future__ import annotations

from pathlib import Path

import pytest

from rollout_server.engines.torch_engine.cache.kv import SMALLEST_CAPACITY, KVCache
from rollout_server.engines.torch_engine.cache.prefix import BLOCK
from rollout_server.engines.torch_engine.cache.rows import Row
from tests.rollout_server.support import TOLERANCE, Reference, load, make_core, random_ids, request, run


def test_the_next_turn_of_a_session_pays_for_its_new_tokens_only(model_dir: Path) -> None:
    core = make_core(load(model_dir))
    ids = random_ids(60, seed=1)
    finished = []
    for turn in range(4):
        before = core.stats.prefilled_tokens
        (running,) = run(core, [request(ids, new=20, sampling_seed=turn, ignore_eos=True)])
        finished.append(running)
        if turn:
            # All that was in the cache is reused: everything but the last sampled token of the turn before.
            assert running.result.cached_tokens == len(ids) - 31
            assert core.stats.prefilled_tokens - before == 30
        ids = running.ids + random_ids(30, seed=100 + turn)
    assert Reference(model_dir).worst(finished) < TOLERANCE


def test_the_samples_of_a_group_share_their_prompts_prefill(model_dir: Path) -> None:
    core = make_core(load(model_dir))
    prompt = random_ids(100, seed=1)
    group = [request(prompt, new=10, rid=str(i), sampling_seed=i, ignore_eos=True) for i in range(8)]
    finished = run(core, group)
    assert core.stats.prefilled_tokens == 99
    assert [r.result.cached_tokens for r in finished] == [0] + [99] * 7
    assert len({tuple(r.result.output_ids) for r in finished}) > 1
    assert Reference(model_dir).worst(finished) < TOLERANCE


def test_group_members_that_come_while_the_first_decodes_share_its_prompt(model_dir: Path) -> None:
    core = make_core(load(model_dir))
    prompt = random_ids(50, seed=1)
    first = core.add(request(prompt, new=40, sampling_seed=0, ignore_eos=True))
    for _ in range(10):
        core.step()
    second = core.add(request(prompt, new=40, sampling_seed=1, ignore_eos=True))
    while core.busy:
        core.step()
    assert second.result.cached_tokens == 49
    assert Reference(model_dir).worst([first, second]) < TOLERANCE


def test_a_prompt_that_differs_in_the_middle_shares_what_comes_before(model_dir: Path) -> None:
    core = make_core(load(model_dir))
    prompt = random_ids(80, seed=1)
    other = [*prompt[:50], *random_ids(30, seed=2)]
    finished = run(core, [request(prompt, sampling_seed=1)]) + run(core, [request(other, sampling_seed=2)])
    assert finished[1].result.cached_tokens == 50
    assert Reference(model_dir).worst(finished) < TOLERANCE


def test_prompts_are_reused_up_to_their_last_token_only(model_dir: Path) -> None:
    core = make_core(load(model_dir))
    prompt = random_ids(3 * BLOCK, seed=1)
    run(core, [request([*prompt, 9], new=1)])
    (again,) = run(core, [request(prompt, new=5, ignore_eos=True)])
    assert again.result.cached_tokens == len(prompt) - 1
    assert Reference(model_dir).worst([again]) < TOLERANCE


def test_kept_prefixes_give_way_to_running_requests(model_dir: Path) -> None:
    core = make_core(load(model_dir), kv_tokens=1024)
    finished = run(core, [request(random_ids(60, seed=i), new=20, sampling_seed=i, ignore_eos=True) for i in range(40)])
    assert core.cache.tokens <= 1024
    assert core.stats.preempted == 0
    assert Reference(model_dir).worst(finished) < TOLERANCE


@pytest.mark.parametrize("free", [5, 0], ids=["its row nearly full", "its row full"])
def test_what_a_request_left_is_unharmed_while_others_decode_beside_it(model_dir: Path, free: int) -> None:
    core = make_core(load(model_dir))
    left = core.add(request(random_ids(SMALLEST_CAPACITY - 20, seed=1), new=90, sampling_seed=1, ignore_eos=True))
    # With this many rows, one hole is not worth closing.
    others = [core.add(request(random_ids(9, seed=i), new=70, sampling_seed=i, ignore_eos=True)) for i in range(12)]
    while left.missing or left.row is None or left.row.filled < SMALLEST_CAPACITY - free:
        core.step()
    core.abort(left, "it leaves")
    while core.busy:
        core.step()
    (again,) = run(core, [request([*left.ids, *random_ids(5, seed=3)], new=5, ignore_eos=True)])
    assert again.result.cached_tokens == min(len(left.ids) - 1, SMALLEST_CAPACITY - 1)
    assert Reference(model_dir).worst([left, again, *others]) < TOLERANCE


def test_a_flushed_cache_shares_nothing(model_dir: Path) -> None:
    core = make_core(load(model_dir))
    prompt = random_ids(50, seed=1)
    run(core, [request(prompt)])
    core.flush()
    assert core.cache.tokens == 0
    (again,) = run(core, [request(prompt)])
    assert again.result.cached_tokens == 0


def _fill(cache: KVCache, row: Row, count: int, value: float) -> None:
    row.pool.k_NRHKC[:, row.row, :, :, :count] = value
    row.pool.v_NRHCD[:, row.row, :, :count] = value
    row.filled = count


def _holds(row: Row, value: float) -> bool:
    pool, n = row.pool, row.filled
    k_ok = (pool.k_NRHKC[:, row.row, :, :, :n] == value).all()
    return bool(k_ok and (pool.v_NRHCD[:, row.row, :, :n] == value).all())


def test_rows_keep_their_content_when_they_are_moved(model_dir: Path) -> None:
    cache = KVCache(load(model_dir).kv, 4096, 512)
    rows: list[Row] = []
    for i in range(12):
        row = cache.place(random_ids(40, seed=i), 48, None, 0)
        assert row is not None
        _fill(cache, row, 40, float(i + 1))
        rows.append(row)
    values = {id(row): float(i + 1) for i, row in enumerate(rows)}
    for i in (1, 2, 3, 8):
        cache.release(rows[i])
    cache.release(rows[5], keep=False)
    assert cache.grow(rows[7], 200)
    cache.compact()
    in_use = [row for row in rows if row.in_use]
    for row in in_use:
        assert row.pool.rows[row.row] is row
        assert row.row < row.pool.active
        assert _holds(row, values[id(row)])
    assert sum(pool.active for pool in cache.pools) == len(in_use)
    for i in (1, 2, 3, 8):
        found, shared = cache.lookup([*rows[i].ids, 9])
        assert (found, shared) == (rows[i], 40)
        assert _holds(rows[i], values[id(rows[i])])
    cache.flush()
    assert all(_holds(row, values[id(row)]) for row in in_use)
