"""The torch engine computes what the model computes, however requests are batched, cut, shared or evicted."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentloop.errors import ModelError
from rollout_server.engines.torch_engine.core import ADMIT_AFTER_STEPS, ADMIT_SHARE, NonFiniteError
from rollout_server.engines.torch_engine.model.fast_decoder import FastDecoder
from tests.rollout_server.support import (
    EOS,
    TOLERANCE,
    VOCAB,
    Reference,
    load,
    make_core,
    mixed_requests,
    random_ids,
    request,
    run,
    save_model,
)

KINDS = [
    ("qwen2", {"num_key_value_heads": 4}),
    ("qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    ("llama", {}),
    ("llama", {"attention_bias": True, "head_dim": 16}),
    ("mistral", {"sliding_window": None}),
    ("qwen3", {"head_dim": 16}),
]


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "transformers"])
def test_logprobs_are_those_of_a_full_forward_pass(tmp_path: Path, kind: str, options: dict, fast: bool) -> None:
    folder = save_model(tmp_path, kind, seed=3, **options)
    finished = run(make_core(load(folder), fast=fast), mixed_requests(12))
    assert Reference(folder).worst(finished) < TOLERANCE
    assert all(len(r.result.output_ids) == r.generation.sampling.max_new_tokens for r in finished)


def test_greedy_ids_are_those_of_a_full_forward_pass(model_dir: Path) -> None:
    prompt = random_ids(20, seed=1)
    (finished,) = run(make_core(load(model_dir)), [request(prompt, new=30, temperature=0.0, ignore_eos=True)])
    assert finished.result.output_ids == Reference(model_dir).greedy(prompt, 30)


def test_a_seeded_request_does_not_depend_on_what_runs_beside_it(model_dir: Path) -> None:
    loaded = load(model_dir)
    requests = mixed_requests(24)
    together = run(make_core(loaded), requests)
    alone = [run(make_core(loaded), [generation])[0] for generation in requests]
    assert [r.ids for r in together] == [r.ids for r in alone]


def test_truncated_sampling_reports_untruncated_logprobs(model_dir: Path) -> None:
    finished = run(make_core(load(model_dir)), mixed_requests(9, top_p=0.7, top_k=12))
    assert Reference(model_dir).worst(finished) < TOLERANCE


def test_a_long_prompt_is_filled_in_chunks_while_others_decode(model_dir: Path) -> None:
    core = make_core(load(model_dir), chunk=32)
    short = core.add(request(random_ids(4, seed=1), new=60, ignore_eos=True))
    core.step()
    long = core.add(request(random_ids(200, seed=2), new=4, ignore_eos=True))
    most = 0
    while not long.logprobs:
        before = core.stats.prefilled_tokens
        sampled = len(short.logprobs)
        core.step()
        assert len(short.logprobs) == sampled + 1
        most = max(most, core.stats.prefilled_tokens - before)
    assert most == 32
    while core.busy:
        core.step()
    assert Reference(model_dir).worst([short, long]) < TOLERANCE


def test_requests_make_way_and_come_back_when_the_cache_is_full(model_dir: Path) -> None:
    # Rows for about 700 tokens; the eight requests need 8 * 300 at their ends.
    core = make_core(load(model_dir), kv_tokens=700)
    requests = [
        request(random_ids(20, seed=i), new=280, rid=str(i), sampling_seed=i, ignore_eos=True) for i in range(8)
    ]
    finished = run(core, requests)
    assert core.stats.preempted > 0
    assert core.cache.tokens <= core.cache.budget_tokens
    assert [len(r.result.output_ids) for r in finished] == [280] * 8
    assert Reference(model_dir).worst(finished) < TOLERANCE


def test_the_longest_sequence_fits_alone(model_dir: Path) -> None:
    core = make_core(load(model_dir), kv_tokens=16)
    finished = run(
        core, [request(random_ids(300, seed=i), new=212, ignore_eos=True, sampling_seed=i) for i in range(3)]
    )
    assert Reference(model_dir).worst(finished) < TOLERANCE


def test_an_end_token_ends_the_turn_and_is_returned(model_dir: Path) -> None:
    core = make_core(load(model_dir))
    (seen,) = run(core, [request(random_ids(10, seed=4), new=40, sampling_seed=4, ignore_eos=True)])
    stop = seen.result.output_ids[11]
    first = seen.result.output_ids.index(stop)
    (cut,) = run(core, [request(random_ids(10, seed=4), new=40, sampling_seed=4, stop_token_ids=[stop])])
    assert cut.result.output_ids == seen.result.output_ids[: first + 1]
    assert (cut.result.finish, cut.result.matched) == ("stop", stop)
    assert (seen.result.finish, seen.result.matched) == ("length", None)


def test_ignore_eos_turns_off_stop_token_ids_too_as_in_sglang(model_dir: Path) -> None:
    core = make_core(load(model_dir))
    options = {"new": 40, "sampling_seed": 4, "ignore_eos": True}
    seen, forced = run(
        core,
        [
            request(random_ids(10, seed=4), rid="seen", **options),
            request(random_ids(10, seed=4), rid="forced", stop_token_ids=list(range(VOCAB)), **options),
        ],
    )
    assert forced.result.output_ids == seen.result.output_ids and len(forced.result.output_ids) == 40
    assert (forced.result.finish, forced.result.matched) == ("length", None)


def test_the_models_own_end_token_ends_the_turn_unless_it_is_ignored(model_dir: Path) -> None:
    loaded = load(model_dir)
    assert loaded.eos_ids == {EOS}
    requests = [request(random_ids(5, seed=i), new=200, sampling_seed=i) for i in range(12)]
    ended = [r.result for r in run(make_core(loaded), requests) if r.result.finish == "stop"]
    assert ended
    assert all(result.output_ids.index(EOS) == len(result.output_ids) - 1 for result in ended)


def test_an_aborted_request_keeps_what_it_has_and_frees_its_row(model_dir: Path) -> None:
    core = make_core(load(model_dir), max_running=1)
    running = core.add(request(random_ids(5, seed=1), new=100, ignore_eos=True))
    waiting = core.add(request(random_ids(5, seed=2), new=3, ignore_eos=True))
    for _ in range(4):
        core.step()
    core.abort(running, "enough")
    assert (running.result.finish, len(running.result.output_ids), running.result.message) == ("abort", 4, "enough")
    while core.busy:
        core.step()
    assert waiting.result.finish == "length"
    assert Reference(model_dir).worst([running, waiting]) < TOLERANCE


def test_broken_weights_are_an_error_and_leave_nothing_behind(model_dir: Path) -> None:
    loaded = load(model_dir)
    core = make_core(loaded)
    weight = loaded.model.model.layers[0].mlp.up_proj.weight
    good = weight.clone()
    weight.fill_(float("nan"))
    core.runner.weights_changed()
    core.add(request(random_ids(40, seed=1), new=3))
    with pytest.raises(NonFiniteError):
        core.step()
    core.drop_all()
    weight.copy_(good)
    core.runner.weights_changed()
    finished = run(core, mixed_requests(4))
    assert Reference(model_dir).worst(finished) < TOLERANCE


def test_a_sliding_window_shorter_than_the_context_is_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "mistral", seed=3, sliding_window=64)
    with pytest.raises(ModelError, match="--context-length 64"):
        load(folder)
    loaded = load(folder, context_length=64)
    finished = run(make_core(loaded), [request(random_ids(30, seed=1), new=34, ignore_eos=True)])
    assert Reference(folder).worst(finished) < TOLERANCE


def test_a_fast_decoder_that_is_wrong_for_the_model_is_not_used(model_dir: Path) -> None:
    loaded = load(model_dir)
    assert FastDecoder.build(loaded) is not None
    loaded.model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * 1.5)
    assert FastDecoder.build(loaded) is None


def test_few_newcomers_wait_a_few_steps_to_be_filled_together(model_dir: Path) -> None:
    core = make_core(load(model_dir), max_running=64)
    for i in range(3 * ADMIT_SHARE):
        core.add(request(random_ids(9, seed=i), new=60, ignore_eos=True))
    core.step()

    def steps_until_admitted(count: int) -> int:
        for i in range(count):
            core.add(request(random_ids(9, seed=100 + i), new=60, ignore_eos=True))
        steps = 0
        while core.snapshot().waiting:
            core.step()
            steps += 1
        return steps

    assert steps_until_admitted(4) == 1
    assert steps_until_admitted(1) == ADMIT_AFTER_STEPS + 1


def test_all_ids_are_in_the_vocabulary(model_dir: Path) -> None:
    finished = run(make_core(load(model_dir)), mixed_requests(8))
    assert all(0 <= token < VOCAB for r in finished for token in r.result.output_ids)
