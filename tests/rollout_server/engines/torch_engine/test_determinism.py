"""An answer of the torch engine depends, to the bit, on its request alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from agentloop.config.server import ServerSettings
from agentloop.errors import ModelError
from rollout_server.engines.base import Generation
from rollout_server.engines.torch_engine.core import Core
from rollout_server.engines.torch_engine.create import create_torch_engine
from rollout_server.engines.torch_engine.model.batch_invariance import is_batch_invariant
from rollout_server.engines.torch_engine.model.fast_decoder import FastDecoder
from rollout_server.engines.torch_engine.model.models import LoadedModel
from tests.rollout_server.support import load, make_core, random_ids, request, run, save_model

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "as many key heads": ("qwen2", {"num_key_value_heads": 4}),
    "groups of two": ("llama", {"attention_bias": True, "head_dim": 16}),
    "groups of seven": ("qwen3", {"num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 16}),
    "sums that are cut": ("qwen2", {"hidden_size": 96, "intermediate_size": 1408, "num_attention_heads": 3,
                                    "num_key_value_heads": 3, "vocab_size": 211}),
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    kind, options = MODELS[request.param]
    return load(save_model(tmp_path_factory.mktemp("model"), kind, 3, **options))


def requests_of(seed: int, count: int = 24) -> list[Generation]:
    """Prompts of many lengths, some with a common start, one with a single token; some answers outgrow their rows."""
    rng = random.Random(seed)
    shared = random_ids(210, seed=99)
    prompts = [shared[: rng.randint(1, 210)] + random_ids(5, i) if i % 3 == 0 else random_ids(rng.randint(1, 150), i)
               for i in range(count - 1)]  # fmt: skip
    return [
        request(ids, new=rng.choice([3, 20, 60]), rid=str(i), temperature=(1.0, 0.7, 0.0)[i % 3], sampling_seed=i,
                ignore_eos=True, top_p=(1.0, 0.9)[i % 2])
        for i, ids in enumerate([[9], *prompts])
    ]  # fmt: skip


def bits(running: Any) -> tuple[list[int], list[float]]:
    return running.result.output_ids, running.result.logprobs


def admitted_at_random(core: Core, requests: list[Generation], rng: random.Random) -> list[Any]:
    """Requests come while others run, and twice all caches are thrown away."""
    running = []
    steps = 0
    for generation in requests:
        running.append(core.add(generation))
        for _ in range(rng.randint(0, 6)):
            core.step()
            steps += 1
            if steps in (20, 45):
                core.retract_all()
                core.flush()
    while core.busy:
        core.step()
    return running


def test_answers_are_the_same_bits_however_they_are_computed(loaded: LoadedModel) -> None:
    requests = requests_of(seed=1)
    core = make_core(loaded, invariant=True)
    alone = []
    for generation in requests:
        alone.append(bits(run(core, [generation])[0]))
        core.flush()
    shuffled = requests.copy()
    random.Random(2).shuffle(shuffled)
    tight = make_core(loaded, invariant=True, kv_tokens=900)
    ways = {
        "together": run(make_core(loaded, invariant=True, max_running=64), requests),
        "in another order, in small pieces": run(make_core(loaded, invariant=True, max_running=7, chunk=33), shuffled),
        "preempted": run(tight, requests),
        "at random": admitted_at_random(make_core(loaded, invariant=True), requests, random.Random(3)),
        "again, from what was cached": run(core, requests) and run(core, requests),
    }
    assert tight.stats.preempted > 0
    for way, finished in ways.items():
        found = {running.generation.rid: bits(running) for running in finished}
        assert [found[generation.rid] for generation in requests] == alone, way


def test_an_answer_goes_on_elsewhere_with_the_same_bits(loaded: LoadedModel) -> None:
    whole = request(random_ids(40, 5), new=60, sampling_seed=7, ignore_eos=True)
    (finished,) = run(make_core(loaded, invariant=True), [whole])
    ids, logprobs = bits(finished)
    rest = request([*whole.input_ids, *ids[:23]], new=37, sampling_seed=7, ignore_eos=True)
    others = requests_of(seed=4, count=6)
    continued, *_ = run(make_core(loaded, invariant=True), [rest, *others])
    assert bits(continued) == (ids[23:], logprobs[23:])


def test_the_trial_at_the_start_finds_a_runner_that_depends_on_its_neighbours(loaded: LoadedModel) -> None:
    runner = FastDecoder.build(loaded, invariant=True)
    assert runner is not None and is_batch_invariant(runner, loaded)

    class Noisy:
        def decode(self, tokens: torch.Tensor, batch: Any) -> torch.Tensor:
            return runner.decode(tokens, batch) * (1.0 + 2e-7 * (len(tokens) > 1))

        prefill = staticmethod(runner.prefill)
        weights_changed = staticmethod(runner.weights_changed)

    assert not is_batch_invariant(Noisy(), loaded)


@pytest.fixture
def threads() -> Iterator[None]:
    """An engine sets the number for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"threads": 2}])
async def test_what_cannot_be_kept_is_refused_or_left_out(model_dir: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="--deterministic on"):
        create_torch_engine(ServerSettings(model=str(model_dir), deterministic="on", **options))
    engine = create_torch_engine(ServerSettings(model=str(model_dir), deterministic="auto", **options))
    await engine.close()
