"""The layout of packed rows, and that it loses nothing."""

from __future__ import annotations

import numpy as np
import pytest

from tests.trainer.conftest import make_samples
from trainer.packing.layout import empty_batch, pack
from trainer.packing.units import micro_batches, packed_length, plan_units
from trainer.types import TrainSample


def sample(ids: list[int], mask: list[int], prompt_length: int, key: int = 0, weight: float = 1.0) -> TrainSample:
    trained = np.array(mask, dtype=bool)
    return TrainSample(
        token_ids=np.array(ids, dtype=np.int32),
        loss_mask=trained,
        old_logprobs=np.where(trained, -1.0, 0.0).astype(np.float32),
        advantages=np.where(trained, 2.0, 0.0).astype(np.float32),
        prompt_length=prompt_length,
        group_key=key,
        weight=weight,
    )


def test_the_worked_example_of_the_docstring() -> None:
    a, b, c, d, e, f, g, h = range(10, 18)
    samples = [sample([a, b, c, d, e, f], [0, 0, 0, 1, 1, 1], 3), sample([a, b, c, g, h], [0, 0, 0, 1, 1], 3)]
    packed = pack(samples, plan_units(samples, 100), "token_mean")
    # Completions are laid out by length: g h before d e f.
    assert packed.tokens.tolist() == [a, b, c, g, d, e]
    assert packed.positions.tolist() == [0, 1, 2, 3, 3, 4]
    assert packed.layout.runs == [(0, 1, 3), (3, 1, 1), (4, 1, 2)]
    assert packed.layout.prefixes == [(3, 3, 0, 3)]
    assert packed.predict_from.tolist() == [2, 3, 2, 4, 5]
    assert packed.targets.tolist() == [g, h, d, e, f]
    assert packed.sample_index.tolist() == [1, 1, 0, 0, 0]
    assert packed.token_index.tolist() == [3, 4, 3, 4, 5]
    assert packed_length(samples) == 6


def test_equal_lengths_side_by_side_are_one_run() -> None:
    samples = [sample([1, 2, 3, 4 + i, 5], [0, 0, 0, 1, 1], 3) for i in range(4)]
    packed = pack(samples, plan_units(samples, 100), "token_mean")
    assert packed.layout.runs == [(0, 1, 3), (3, 4, 1)]


def test_tokens_after_the_last_trained_one_are_not_computed() -> None:
    samples = [sample([1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 1, 0, 0, 0], 2)]
    packed = pack(samples, plan_units(samples, 100), "token_mean")
    assert packed.tokens.tolist() == [1, 2, 3]
    assert packed.targets.tolist() == [3, 4]


def test_a_completion_of_one_token_needs_the_prompt_only() -> None:
    samples = [sample([1, 2, 3], [0, 0, 1], 2), sample([1, 2, 4], [0, 0, 1], 2)]
    packed = pack(samples, plan_units(samples, 100), "token_mean")
    assert packed.tokens.tolist() == [1, 2]
    assert packed.layout.prefixes == []
    assert packed.predict_from.tolist() == [1, 1]


@pytest.mark.parametrize("budget", [16, 40, 100, 10_000])
def test_every_trained_token_is_packed_exactly_once(budget: int) -> None:
    samples = make_samples(groups=5, size=6)
    seen: list[tuple[int, int]] = []
    for units in micro_batches(plan_units(samples, budget), budget):
        packed = pack(samples, units, "token_mean")
        assert len(packed.tokens) <= budget or len(units) == len(units[0].samples) == 1
        assert sum(count * length for _, count, length in packed.layout.runs) == len(packed.tokens)
        for n in range(len(packed.targets)):
            index, token = int(packed.sample_index[n]), int(packed.token_index[n])
            seen.append((index, token))
            assert packed.targets[n] == samples[index].token_ids[token]
            assert packed.positions[packed.predict_from[n]] == token - 1
            assert packed.tokens[packed.predict_from[n]] == samples[index].token_ids[token - 1]
            assert packed.columns["old_logprobs"][n] == samples[index].old_logprobs[token]
    expected = [(i, int(t)) for i, s in enumerate(samples) for t in np.flatnonzero(s.loss_mask)]
    assert sorted(seen) == expected


def test_loss_weights_follow_the_aggregation() -> None:
    samples = [sample([1, 2, 3, 4], [0, 0, 1, 1], 2, weight=0.5)]
    assert pack(samples, plan_units(samples, 9), "token_mean").loss_weights.tolist() == [0.5, 0.5]
    assert pack(samples, plan_units(samples, 9), "seq_mean_token_mean").loss_weights.tolist() == [0.25, 0.25]


def test_the_empty_batch_trains_nothing() -> None:
    assert empty_batch().loss_weights.tolist() == [0.0]


def test_a_trained_prompt_token_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt has loss mask 1"):
        sample([1, 2, 3], [0, 1, 1], 2).check()
