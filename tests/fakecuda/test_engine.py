"""The torch engine on a fake card: it loads a model, fills its cache, decodes, and takes new weights."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from agentloop.config.server import ServerSettings
from rollout_server.engines.base import BroadcastWeights, Generation, UpdateGroup
from rollout_server.engines.torch_engine.cache.kv import build_cache
from rollout_server.engines.torch_engine.core import PREFILL_CHUNK, Core
from rollout_server.engines.torch_engine.create import create_torch_engine
from rollout_server.engines.torch_engine.model.fast_decoder import FastDecoder
from rollout_server.engines.torch_engine.model.models import LoadedModel, Runner, load_model, slow_runner
from rollout_server.engines.torch_engine.weights import broadcast as broadcasts
from rollout_server.engines.torch_engine.weights.loader import WeightLoader
from tests.fakecuda.cards import FakeCards
from tests.fakecuda.conftest import ModelFactory
from tests.fakecuda.full_size import NAMES, VISION_LANGUAGE
from tests.fakecuda.material import generation

pytestmark = pytest.mark.fakecuda

CARD = torch.device("cuda", 1)
"""Of the second replica; its process stays on card 0, where anything without a device of its own lands."""

ENGINE = "rollout_server/engines/torch_engine"
STEADY = {
    ("to card", f"{ENGINE}/sampling/sampling.py"),  # the uniform numbers of a step
    ("to host", f"{ENGINE}/core.py"),  # its tokens and their logprobs
}
"""All transfers of a decode step that continues a batch."""

BATCH = {
    ("to card", f"{ENGINE}/{file}.py")
    for file in ("batch", "model/attention", "sampling/penalties", "sampling/sampling")
}
"""Transfers of a new batch: ids, positions and sampling parameters."""

IMAGES = {
    ("to card", f"{ENGINE}/model/vision.py"),  # patches, grids and positions; transformers' order of windows
    ("to host", f"{ENGINE}/model/vision.py"),  # transformers reads the grids, and the lengths of windows in each block
}


def loaded_model(model: ModelFactory, name: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> LoadedModel:
    return load_model(str(model(name, **changes)), dtype=dtype, device=CARD, context_length=4096)


def core_of(loaded: LoadedModel, runner: Runner) -> Core:
    cache = build_cache(
        loaded.kv,
        loaded.context_length,
        max_running=16,
        max_kv_tokens=None,
        memory_bytes=torch.cuda.mem_get_info(CARD)[0],
    )
    return Core(runner, cache, eos_ids=loaded.eos_ids, max_running=16, device=CARD, never_sampled=[5])


def add(core: Core, loaded: LoadedModel, request: Generation) -> None:
    images = loaded.images.read(request.input_ids, request.image_data) if loaded.images is not None else None
    core.add(request, images)


def run(core: Core) -> list[Any]:
    """Step until all requests are answered; returns their results."""
    results = []
    while core.busy:
        results += [running.result for running in core.step()]
    return results


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_prefills_and_decodes_on_its_card(cards: FakeCards, model: ModelFactory, name: str) -> None:
    loaded = loaded_model(model, name)
    assert {tensor.device for tensor in loaded.model.state_dict().values()} == {CARD}
    core, image = core_of(loaded, slow_runner(loaded)), name == VISION_LANGUAGE
    with cards.watch() as prefill:
        add(core, loaded, generation("long", PREFILL_CHUNK + 90, image=image, max_new_tokens=4, top_p=0.9, top_k=50))
        add(core, loaded, generation("short", 40, max_new_tokens=3, temperature=0.0, repetition_penalty=1.1))
        for _ in range(2):
            core.step()
    assert core.stats.sampled_tokens >= 2
    assert prefill <= BATCH | STEADY | (IMAGES if image else set())
    with cards.watch() as decode:
        core.step()
    assert decode == STEADY
    finished = run(core)
    assert [len(result.output_ids) for result in finished] == [3, 4]
    assert cards.devices == {CARD}


def test_requests_share_a_prompt_grow_and_are_preempted_on_the_card(cards: FakeCards, model: ModelFactory) -> None:
    loaded = loaded_model(model, "Qwen2.5-0.5B", num_hidden_layers=2)
    core = core_of(loaded, slow_runner(loaded))
    for number in range(4):
        sampling = {"max_new_tokens": 40, "min_p": 0.1 * (number % 2), "logit_bias": {7: -1.0}}
        add(core, loaded, generation(f"{number}", 90, **sampling))
    for _ in range(20):
        core.step()
    core.retract_all()
    core.weights_changed("1", "in_place")
    assert [len(result.output_ids) for result in run(core)] == [40] * 4
    assert core.stats.cached_tokens >= 3 * 89
    assert cards.devices == {CARD}


def test_a_small_model_in_float32_runs_through_the_fast_decoder(cards: FakeCards, model: ModelFactory) -> None:
    loaded = loaded_model(model, "Qwen2.5-0.5B", torch.float32, num_hidden_layers=2)
    fast = FastDecoder.build(loaded)
    assert fast is not None
    core = core_of(loaded, fast)
    add(core, loaded, generation("a", 200, max_new_tokens=4))
    assert [len(result.output_ids) for result in run(core)] == [4]
    assert cards.devices == {CARD}


def test_an_engine_takes_weights_that_arrive_on_its_card(
    cards: FakeCards, model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # NCCL would open sockets and wait for the trainer. What is received is looked at in its place.
    received: list[torch.Tensor] = []
    monkeypatch.setattr(broadcasts, "connect_store", lambda address, port: None)
    monkeypatch.setattr(broadcasts, "join_group", lambda store, **options: options)
    monkeypatch.setattr(broadcasts, "broadcast", lambda group, tensor: received.append(tensor))
    monkeypatch.setattr(broadcasts, "leave_group", lambda group: None)

    loaded = loaded_model(model, "Qwen2.5-0.5B", num_hidden_layers=2)
    loader = WeightLoader(loaded.model)
    loader.groups.join(UpdateGroup("weights", "127.0.0.1", 1, 1, 2, "nccl"), CARD)
    named = dict(loaded.model.named_parameters())
    for bucket_bytes in (None, 2**24):
        source = BroadcastWeights(
            tuple(named),
            ("bfloat16",) * len(named),
            tuple(tuple(p.shape) for p in named.values()),
            "weights",
            bucket_bytes,
        )
        loader.swap_in(loader.stage(source, "1"))
        assert {tensor.device for tensor in received} == {CARD}
        assert {tensor.device for tensor in named.values()} == {CARD}
        core = core_of(loaded, slow_runner(loaded))
        add(core, loaded, generation("a", 40, max_new_tokens=2))
        assert [len(result.output_ids) for result in run(core)] == [2]
    assert cards.devices == {CARD}


def test_an_engine_is_created_on_its_card(cards: FakeCards, model: ModelFactory) -> None:
    folder = model("Qwen2.5-0.5B", num_hidden_layers=2)
    settings = ServerSettings(
        model=str(folder), weights=folder, dtype="bfloat16", device="cuda", first_gpu=CARD.index, memory_saver=True
    )
    engine = create_torch_engine(settings)
    try:
        asyncio.run(engine.memory("release", None))
        assert {tensor.device for tensor in engine.model.state_dict().values()} == {CARD}
    finally:
        asyncio.run(engine.close())
    assert cards.devices == {CARD}
