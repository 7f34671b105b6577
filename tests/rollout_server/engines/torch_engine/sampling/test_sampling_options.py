"""Every sampling parameter against a naive computation of its distribution, in the sampler and in the whole engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentloop.wire import SamplingParams
from rollout_server.engines.base import Generation
from rollout_server.engines.torch_engine.core import Core
from rollout_server.engines.torch_engine.sampling.penalties import Penalties
from rollout_server.engines.torch_engine.sampling.sampling import RowSampling, Sampler, stream_of
from tests.rollout_server.engines.torch_engine.sampling.naive_sampling import edited, truncated, whole
from tests.rollout_server.support import EOS, TOLERANCE, VOCAB, Reference, load, make_core, random_ids, request, run

CPU = torch.device("cpu")
LOGITS = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.5
SAMPLED = [0, 3, 3, 5, 9, 3, 0]
ENDS = frozenset({2, 7})

OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "min_p": {"min_p": 0.2},
    "min_p and temperature": {"min_p": 0.2, "temperature": 2.0},
    "min_p is wider than top_k and top_p": {"min_p": 0.01, "top_k": 4, "top_p": 0.9},
    "min_p is narrower than top_k and top_p": {"min_p": 0.5, "top_k": 6, "top_p": 0.95},
    "repetition": {"repetition_penalty": 1.7},
    "reward of repetition": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.8},
    "reward of frequency": {"frequency_penalty": -0.5},
    "all penalties": {"repetition_penalty": 1.4, "presence_penalty": 0.9, "frequency_penalty": -0.3},
    "bias": {"logit_bias": {1: 2.0, 3: -1.0, 9: 0.0}},
    "min_new_tokens not reached": {"min_new_tokens": 8, "stop_token_ids": [4]},
    "min_new_tokens reached": {"min_new_tokens": 7, "stop_token_ids": [4]},
    "everything": {
        "temperature": 1.3, "min_p": 0.05, "top_k": 7, "top_p": 0.97, "repetition_penalty": 1.2, "min_new_tokens": 9,
        "presence_penalty": 0.4, "frequency_penalty": 0.3, "logit_bias": {3: 1.5, 7: 2.0, 0: 0.5},
    },
}  # fmt: skip


def params(**options: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 20, **options})


def row(sampling: SamplingParams, seed: int = 1) -> RowSampling:
    """As the engine makes it."""
    ends = ENDS | frozenset(sampling.stop_token_ids or ())
    penalties = Penalties.of(sampling, ends)
    stream = stream_of(seed)
    return RowSampling(sampling.temperature, sampling.top_p, sampling.top_k, stream, sampling.min_p, penalties)


def counters(count: int, start: int = 0) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return np.arange(start, start + count, dtype=np.uint64)


def chi_square(tokens: torch.Tensor, expected: Sequence[float]) -> tuple[float, int]:
    """The statistic and its degrees of freedom; a token without a probability has to be absent."""
    counts = torch.bincount(tokens, minlength=len(expected)).tolist()
    assert not any(count for count, p in zip(counts, expected, strict=True) if p == 0)
    terms = [(n - len(tokens) * p) ** 2 / (len(tokens) * p) for n, p in zip(counts, expected, strict=True) if p > 0]
    return sum(terms), len(terms) - 1


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_frequencies_and_logprobs_are_those_of_the_naive_distribution(options: dict[str, Any]) -> None:
    sampling = params(**options)
    count = 20_000
    sampler = Sampler([row(sampling)] * count, CPU, [SAMPLED] * count)
    tokens, logprobs = sampler.draw(LOGITS.expand(count, -1), counters(count))
    before = whole(edited(LOGITS.tolist(), SAMPLED, sampling, ENDS), sampling.temperature)
    statistic, freedom = chi_square(tokens, truncated(before, sampling))
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 4
    expected = torch.tensor([math.log(p) if p else -math.inf for p in before])
    assert torch.allclose(logprobs, expected[tokens], atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_greedy_rows_take_the_likeliest_of_the_edited_logits(options: dict[str, Any]) -> None:
    sampling = params(**{**options, "temperature": 0.0})
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(200, 12, generator=generator)
    sampler = Sampler([row(sampling)] * 200, CPU, [SAMPLED] * 200)
    tokens, logprobs = sampler.draw(logits, counters(200))
    for place in range(200):
        expected = edited(logits[place].tolist(), SAMPLED, sampling, ENDS)
        assert tokens[place] == max(range(12), key=expected.__getitem__)
        assert abs(logprobs[place] - math.log(whole(expected, 1.0)[int(tokens[place])])) < 1e-5


def test_a_row_draws_the_same_whoever_its_neighbours_are() -> None:
    kinds = [params(**{**options, "temperature": t}) for options in OPTIONS.values() for t in (0.0, 0.7, 1.0)]
    rows = [row(kind, seed) for seed, kind in enumerate(kinds)]
    past = [[SAMPLED[i % 7], i % 12] for i in range(len(rows))]
    logits = torch.randn(4, len(rows), 12, generator=torch.Generator().manual_seed(5))

    def four_steps(places: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        sampler = Sampler([rows[i] for i in places], CPU, [past[i] for i in places])
        drawn = []
        for step in range(4):
            given = logits[step, list(places)]
            kept = given.clone()
            drawn.append(sampler.draw(given, np.full(len(places), step, dtype=np.uint64)))
            assert torch.equal(given, kept), "the model's logits are not the sampler's to change"
            sampler.advance(drawn[-1][0])
        return drawn

    together = four_steps(range(len(rows)))
    for i in range(len(rows)):
        for (tokens, logprobs), (token, logprob) in zip(together, four_steps([i]), strict=True):
            assert (tokens[i], logprobs[i]) == (token[0], logprob[0])


def test_counts_that_went_on_step_by_step_are_those_counted_anew() -> None:
    sampling = params(repetition_penalty=1.3, frequency_penalty=0.7, presence_penalty=0.2, min_new_tokens=5)
    stepped = Sampler([row(sampling)] * 3, CPU, [[], [1], [2, 2]])
    sampled: list[list[int]] = [[], [1], [2, 2]]
    logits = torch.randn(10, 3, 12, generator=torch.Generator().manual_seed(6))
    for step in range(10):
        tokens, logprobs = stepped.draw(logits[step], counters(3, step))
        anew = Sampler([row(sampling)] * 3, CPU, sampled).draw(logits[step], counters(3, step))
        assert torch.equal(tokens, anew[0]) and torch.equal(logprobs, anew[1])
        stepped.advance(tokens)
        sampled = [[*ids, int(token)] for ids, token in zip(sampled, tokens, strict=True)]


def test_rows_without_penalties_have_none() -> None:
    assert row(params(temperature=0.5, top_p=0.9, min_p=0.1, stop_token_ids=[1])).penalties is None
    assert row(params(logit_bias={})).penalties is None and row(params(logit_bias={4: 0.0})).penalties is None


def test_penalties_that_leave_no_token_or_overflow_do_not_look_like_broken_weights() -> None:
    for options in ({"min_new_tokens": 3, "stop_token_ids": list(range(12))}, {"repetition_penalty": 1e-300}):
        sampler = Sampler([row(params(**options))], CPU, [[1]])
        assert torch.isfinite(sampler.draw(LOGITS[None], counters(1))[1]).all()
    far = RowSampling(1.0, 1.0, -1, 0, penalties=Penalties(min_new_tokens=3, ends=frozenset({-1, 12, 500})))
    assert torch.isfinite(Sampler([far], CPU).draw(LOGITS[None], counters(1))[1]).all()


# The whole engine

ENGINE_OPTIONS = [{k: v for k, v in options.items() if k != "stop_token_ids"} for options in OPTIONS.values()]


def engine_requests(temperature: float | None = None, new: int = 40) -> list[Generation]:
    """One of each kind. Prompts are full of the same tokens, which penalties must not count."""
    requests = []
    for i, options in enumerate(ENGINE_OPTIONS):
        chosen = {"sampling_seed": i, **options, "ignore_eos": i % 2 == 0}
        if temperature is not None:
            chosen["temperature"] = temperature
        bias = {token: (value if i % 2 else -value) for token, value in chosen.pop("logit_bias", {}).items()}
        chosen["logit_bias"] = {**bias, EOS: 3.0} if i % 3 == 0 else (bias or None)
        requests.append(request(random_ids(5 + i, seed=i) * 2, new=new, rid=str(i), **chosen))
    return requests


def check_against_the_reference(finished: Sequence[Any], model_dir: Path) -> None:
    reference = Reference(model_dir)
    for running in finished:
        sampling, start = running.generation.sampling, running.prompt_length
        table = reference.logits(running.ids, start)
        assert len(running.result.logprobs) == len(running.ids) - start
        for place, logprob in enumerate(running.result.logprobs):
            token = running.ids[start + place]
            sampled = running.ids[start : start + place]
            logits = edited(table[place], sampled, sampling, frozenset({EOS}))
            before = whole(logits, sampling.temperature)
            assert abs(logprob - math.log(before[token])) < 3 * TOLERANCE
            if sampling.temperature == 0:
                assert logits[token] > max(logits) - 1e-4
            else:
                assert truncated(before, sampling)[token] > 0


@pytest.mark.parametrize("temperature", [None, 0.0])
def test_every_option_together_in_one_batch_is_sampled_as_computed_naively(
    model_dir: Path, temperature: float | None
) -> None:
    finished = run(make_core(load(model_dir)), engine_requests(temperature))
    check_against_the_reference(finished, model_dir)


def test_preemption_keeps_the_counts(model_dir: Path) -> None:
    core = make_core(load(model_dir), kv_tokens=1500)
    finished = run(core, engine_requests(new=120))
    assert core.stats.preempted > 0
    check_against_the_reference(finished, model_dir)
    alone = [run(make_core(load(model_dir)), [generation])[0] for generation in engine_requests(new=120)]
    assert [r.ids for r in finished] == [r.ids for r in alone]


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_weight_update_keeps_the_counts(model_dir: Path, mode: Any) -> None:
    core = make_core(load(model_dir))
    running = [core.add(generation) for generation in engine_requests()]
    for step in range(30):
        core.step()
        if step in (11, 20):
            core.weights_changed(str(step), mode)
    while core.busy:
        core.step()
    assert len(running[0].result.spans) == 3
    check_against_the_reference(running, model_dir)
    undisturbed = run(make_core(load(model_dir)), engine_requests())
    assert [r.ids for r in running] == [r.ids for r in undisturbed], "the weights were in fact the same"


def make(model_dir: Path) -> Core:
    return make_core(load(model_dir))


def generate(model_dir: Path, **options: Any) -> Any:
    return run(make(model_dir), [request(random_ids(9, seed=1), **{"new": 12, "sampling_seed": 3, **options})])[
        0
    ].result


def test_min_new_tokens_holds_back_end_and_stop_tokens(model_dir: Path) -> None:
    at_once = generate(model_dir, logit_bias={EOS: 100.0})
    assert at_once.output_ids == [EOS]
    late = generate(model_dir, logit_bias={EOS: 100.0}, min_new_tokens=5)
    assert len(late.output_ids) == 6 and late.output_ids.index(EOS) == 5 and late.finish == "stop"
    both = generate(model_dir, logit_bias={EOS: 90.0, 50: 100.0}, min_new_tokens=5, stop_token_ids=[50, 51])
    assert not {EOS, 50, 51} & set(both.output_ids[:5]) and both.output_ids[5:] == [50] and both.matched == 50
    ignored = generate(model_dir, logit_bias={EOS: 100.0}, min_new_tokens=5, ignore_eos=True)
    assert EOS not in ignored.output_ids[:5] and ignored.output_ids[5:] == [EOS] * 7 and ignored.finish == "length"
    stopped = generate(model_dir, logit_bias={50: 100.0}, min_new_tokens=3, stop_token_ids=[50])
    assert stopped.output_ids[3:] == [50] and stopped.finish == "stop"
    forced = generate(model_dir, logit_bias={50: 100.0}, min_new_tokens=3, ignore_eos=True, stop_token_ids=[50])
    assert 50 not in forced.output_ids[:3] and forced.output_ids[3:] == [50] * 9 and forced.finish == "length"
    all_of_it = generate(model_dir, logit_bias={EOS: 100.0}, min_new_tokens=12)
    assert len(all_of_it.output_ids) == 12 and EOS not in all_of_it.output_ids


def test_a_bias_of_100_decides_and_one_of_minus_100_forbids(model_dir: Path) -> None:
    assert generate(model_dir, logit_bias={42: 100.0}).output_ids == [42] * 12
    forbidden = {token: -100.0 for token in range(VOCAB) if token % 2 == 0 or token == EOS}
    output = generate(model_dir, logit_bias=forbidden, new=60).output_ids
    assert len(output) == 60 and all(token % 2 for token in output)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_p": 0.9, "min_p": 0.02}])
@pytest.mark.parametrize("cut", [1, 17, 39])
def test_a_request_cut_in_the_middle_and_continued_elsewhere_draws_the_same(
    model_dir: Path, options: dict[str, Any], cut: int
) -> None:
    prompt = random_ids(20, seed=2)
    options = {"sampling_seed": 11, "ignore_eos": True, **options}
    whole_run = run(make(model_dir), [request(prompt, new=40, **options)])[0].result
    first = run(make(model_dir), [request(prompt, new=cut, **options)])[0].result
    assert first.output_ids == whole_run.output_ids[:cut]
    second = run(make(model_dir), [request(prompt + first.output_ids, new=40 - cut, **options)])[0].result
    assert first.output_ids + second.output_ids == whole_run.output_ids
    together = first.logprobs + second.logprobs
    assert max(abs(a - b) for a, b in zip(together, whole_run.logprobs, strict=True)) < TOLERANCE
