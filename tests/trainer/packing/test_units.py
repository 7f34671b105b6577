"""Units of samples that share a prompt, divided over ranks."""

from __future__ import annotations

from tests.trainer.conftest import make_samples
from tests.trainer.packing.test_layout import sample
from trainer.algorithms.aggregation import normalizer
from trainer.packing.units import packed_length, plan_units, split_over_ranks


def test_samples_without_a_trained_token_are_left_out() -> None:
    samples = [sample([1, 2, 3], [0, 0, 0], 2), sample([1, 2, 4, 5], [0, 0, 1, 1], 2)]
    assert [unit.samples for unit in plan_units(samples, 100)] == [[1]]
    assert normalizer(samples, "token_mean") == 2
    assert normalizer(samples, "seq_mean_token_sum") == 1
    assert normalizer([], "token_mean") == 1


def test_ranks_get_about_equal_work_and_every_sample_once() -> None:
    samples = make_samples(groups=12, size=8, prompt=20, longest=60)
    shares = split_over_ranks(samples, 3, 512, 4096)
    assert sorted(index for share in shares for index in share) == list(range(len(samples)))
    work = [packed_length([samples[index] for index in share]) for share in shares]
    assert max(work) < 1.25 * min(work)


def test_one_group_is_divided_when_there_are_more_ranks_than_groups() -> None:
    samples = make_samples(groups=1, size=8)
    assert all(split_over_ranks(samples, 2, 8192, 32))
