"""Drawing follows the distribution it reports."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rollout_server.engines.torch_engine.sampling.sampling import RowSampling, Sampler, invert, stream_of, uniforms

CPU = torch.device("cpu")


def draw(logits: torch.Tensor, row: RowSampling, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` draws from one row's logits, with the counters 0, 1, 2, ..."""
    sampler = Sampler([row] * count, CPU)
    return sampler.draw(logits.expand(count, -1), np.arange(count, dtype=np.uint64))


def row(temperature: float = 1.0, top_p: float = 1.0, top_k: int = -1, seed: int = 1) -> RowSampling:
    return RowSampling(temperature, top_p, top_k, stream_of(seed))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_frequencies_are_the_reported_probabilities(temperature: float) -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -float("inf"), 0.5])
    tokens, logprobs = draw(logits, row(temperature), 40_000)
    expected = torch.log_softmax(logits / temperature, -1)
    assert torch.allclose(logprobs, expected[tokens], atol=1e-6)
    frequencies = torch.bincount(tokens, minlength=6) / len(tokens)
    assert torch.allclose(frequencies, expected.exp(), atol=0.01)
    assert frequencies[4] == 0


def test_top_k_and_top_p_keep_the_likeliest_and_report_the_whole_distribution() -> None:
    logits = torch.log(torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]))
    for truncated, kept in ((row(top_k=2), {1, 3}), (row(top_p=0.6), {1, 3}), (row(top_p=0.71), {1, 3, 4})):
        tokens, logprobs = draw(logits, truncated, 4_000)
        assert set(tokens.tolist()) == kept
        assert torch.allclose(logprobs, logits[tokens], atol=1e-6)
    assert set(draw(logits, row(top_p=1e-6), 100)[0].tolist()) == {1}


def test_temperature_0_is_greedy_and_reports_temperature_1() -> None:
    logits = torch.tensor([0.3, 2.0, -1.0])
    tokens, logprobs = draw(logits, row(temperature=0.0), 50)
    assert set(tokens.tolist()) == {1}
    assert torch.allclose(logprobs, torch.log_softmax(logits, -1)[1])


def test_rows_of_different_kinds_do_not_mix() -> None:
    logits = torch.log(torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]))
    kinds = [row(), row(0.0), row(top_k=1), row(0.5), row(top_p=0.5)]
    sampler = Sampler(kinds, CPU)
    together = sampler.draw(logits.expand(5, -1), np.full(5, 3, dtype=np.uint64))
    for i, kind in enumerate(kinds):
        alone = Sampler([kind], CPU).draw(logits[None], np.full(1, 3, dtype=np.uint64))
        assert together[0][i] == alone[0][0]
        assert together[1][i] == alone[1][0]


def test_uniforms_are_uniform_and_a_function_of_seed_and_counter() -> None:
    streams = np.array([stream_of(seed) for seed in range(200)], dtype=np.uint64)
    table = np.stack([uniforms(streams, np.full(200, t, dtype=np.uint64)) for t in range(200)])
    assert (table >= 0).all()
    assert (table < 1).all()
    assert abs(table.mean() - 0.5) < 0.005
    assert np.histogram(table, bins=16, range=(0, 1))[0].std() < 80
    neighbours = np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]
    in_time = np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]
    assert max(abs(neighbours), abs(in_time)) < 0.02
    assert uniforms(streams[5:6], np.array([7], dtype=np.uint64))[0] == table[7, 5]


def test_the_extreme_uniforms_draw_tokens_that_have_a_probability() -> None:
    probabilities = torch.softmax(torch.randn(500, 300, generator=torch.Generator().manual_seed(0)), -1)
    probabilities[:, [0, 1, 150, 298, 299]] = 0
    for extreme in (0.0, 1 - 2.0**-23):
        drawn = invert(probabilities, torch.full((500, 1), extreme))
        assert (probabilities.gather(-1, drawn) > 0).all()
