"""Vision-language models compute what transformers does with the same pixels, however prompts are cut or shared."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from rollout_server.engines.base import FolderWeights, Generation
from rollout_server.engines.torch_engine.core import Core
from rollout_server.engines.torch_engine.model import vision
from rollout_server.engines.torch_engine.model.images import FIRST_LOOKUP_ID
from rollout_server.engines.torch_engine.model.models import LoadedModel
from rollout_server.engines.torch_engine.running import Running
from rollout_server.engines.torch_engine.weights.loader import WeightLoader
from tests.rollout_server.support import (
    PAD,
    VISION_CLASSES,
    VISION_END,
    VISION_START,
    VOCAB,
    load,
    make_core,
    picture,
    random_ids,
    request,
    save_vision_model,
)

TOLERANCE = 1e-4
SAMPLED = [token for token in range(VOCAB) if token not in (PAD, PAD + 1)]
"""Placeholders of images and videos are never sampled."""


class VisionReference:
    """transformers' own generate, pixels and all."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        self._processor = AutoImageProcessor.from_pretrained(folder)

    def _inputs(self, ids: Sequence[int], images: Sequence[str]) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": torch.tensor([list(ids)])}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if images:
            opened = [Image.open(io.BytesIO(base64.b64decode(image))) for image in images]
            inputs |= dict(self._processor(images=opened, return_tensors="pt"))
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == PAD).int()
        return inputs

    def greedy(
        self, ids: Sequence[int], images: Sequence[str], new: int, forced: dict[int, int] | None = None
    ) -> tuple[list[int], list[float]]:
        """The sampled ids and their logprobs; `forced[i]` takes the place of the i-th."""

        def allowed(_: int, so_far: torch.Tensor) -> list[int]:
            place = len(so_far) - len(ids)
            return [forced[place]] if forced and place in forced else SAMPLED

        out = self._model.generate(
            **self._inputs(ids, images), max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None,
            output_logits=True, return_dict_in_generate=True, prefix_allowed_tokens_fn=allowed,
        )  # fmt: skip
        sampled = out.sequences[0, len(ids) :].tolist()
        tables = [torch.log_softmax(logits[0], -1) for logits in out.logits]
        return sampled, [float(table[token]) for table, token in zip(tables, sampled, strict=True)]

    def check(self, *finished: Running) -> None:
        for running in finished:
            generation, result = running.generation, running.result
            assert result is not None
            ids, logprobs = self.greedy(generation.input_ids, generation.image_data, len(result.output_ids))
            assert result.output_ids == ids
            assert result.logprobs == pytest.approx(logprobs, abs=TOLERANCE)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family."""
    return save_vision_model(tmp_path_factory.mktemp(request.param), request.param, seed=0)


@pytest.fixture(scope="module")
def other_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with other weights, those of the tower included."""
    kind = next(kind for kind in VISION_CLASSES if folder.name.rstrip("0123456789") == kind)
    return save_vision_model(tmp_path_factory.mktemp("other"), kind, seed=1)


@pytest.fixture(scope="module")
def side(folder: Path) -> int:
    """Pixels of a merged patch's side."""
    return 2 * int(AutoImageProcessor.from_pretrained(folder).patch_size)


def text(count: int, seed: int) -> list[int]:
    return random_ids(count, seed, below=PAD)


def image_ids(*counts: int) -> list[int]:
    """The ids that a template writes for images with these numbers of tokens."""
    return [token for count in counts for token in (VISION_START, *[PAD] * count, VISION_END)]


def ask(ids: Sequence[int], images: Sequence[str] = (), new: int = 12, rid: str = "r") -> Generation:
    generation = request(ids, new=new, rid=rid, temperature=0.0, ignore_eos=True)
    generation.image_data = list(images)
    return generation


def add(core: Core, loaded: LoadedModel, generation: Generation) -> Running:
    assert loaded.images is not None
    return core.add(generation, loaded.images.read(generation.input_ids, generation.image_data))


def run(core: Core, loaded: LoadedModel, *requests: Generation) -> list[Running]:
    """Run them together."""
    running = [add(core, loaded, generation) for generation in requests]
    while core.busy:
        core.step()
    return running


def looks(loaded: LoadedModel) -> list[int]:
    """A list that grows by one for each run of the vision tower."""
    seen: list[int] = []
    loaded.model.base_model.visual.register_forward_hook(lambda *_: seen.append(1))
    return seen


@pytest.mark.parametrize("kind", VISION_CLASSES)
def test_greedy_ids_and_logprobs_are_those_of_transformers_generate(tmp_path: Path, kind: str) -> None:
    folder = save_vision_model(tmp_path, kind, seed=2)
    loaded = load(folder)
    side = 2 * VISION_CLASSES[kind][2]
    ids = [*text(9, 1), *image_ids(6), *text(7, 2)]
    finished = run(make_core(loaded, fast=False), loaded, ask(ids, [picture(3 * side, 2 * side)], new=30))
    VisionReference(folder).check(*finished)


def test_images_of_different_sizes_and_after_turns_of_text(folder: Path, side: int) -> None:
    loaded = load(folder)
    core = make_core(loaded, fast=False)
    two = [*text(5, 1), *image_ids(6, 20), *text(7, 2)]
    late = [*text(120, 3), *image_ids(12), *text(40, 4), *image_ids(2), *text(3, 5)]
    finished = run(
        core,
        loaded,
        ask(two, [picture(2 * side, 3 * side, 1), picture(5 * side, 4 * side, 2)]),
        ask(late, [picture(6 * side, 2 * side, 3), picture(side, 2 * side, 4)]),
    )
    VisionReference(folder).check(*finished)


def test_requests_with_and_without_images_run_beside_each_other(folder: Path, side: int) -> None:
    loaded = load(folder)
    core = make_core(loaded, fast=False, max_running=6)
    requests = []
    for i in range(12):
        ids, images = text(5 + 7 * i, i), []
        if i % 2:
            ids += [*image_ids(2 * i), *text(i, 50 + i)]
            images = [picture(2 * side, i * side, i)]
        requests.append(ask(ids, images, new=5 + 3 * i, rid=str(i)))
    VisionReference(folder).check(*run(core, loaded, *requests))


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_a_chunk_may_end_within_an_image(folder: Path, side: int, chunk: int) -> None:
    loaded = load(folder)
    seen = looks(loaded)
    ids = [*text(9, 1), *image_ids(24, 4), *text(7, 2)]
    images = [picture(6 * side, 4 * side, 1), picture(2 * side, 2 * side, 2)]
    finished = run(make_core(loaded, fast=False, chunk=chunk), loaded, ask(ids, images), ask(text(30, 3)))
    VisionReference(folder).check(*finished)
    assert len(seen) == 2


def test_an_image_is_looked_at_once_for_all_that_bring_it(folder: Path, side: int) -> None:
    loaded = load(folder)
    seen = looks(loaded)
    image = picture(3 * side, 2 * side)
    requests = [ask([*text(5 + i, i), *image_ids(6), *text(3, i)], [image], rid=str(i)) for i in range(4)]
    VisionReference(folder).check(*run(make_core(loaded, fast=False), loaded, *requests))
    assert len(seen) == 1


def test_features_that_were_given_up_are_computed_again(
    folder: Path, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision, "FEATURE_CACHE_BYTES", 1)
    loaded = load(folder)
    seen = looks(loaded)
    ids = [*text(5, 1), *image_ids(6, 6, 6), *text(3, 2)]
    images = [picture(3 * side, 2 * side, i) for i in (1, 2, 1)]
    VisionReference(folder).check(*run(make_core(loaded, fast=False), loaded, ask(ids, images)))
    assert len(seen) == 3


def test_prompts_share_rows_as_far_as_their_images_are_the_same(folder: Path, side: int) -> None:
    loaded = load(folder)
    core = make_core(loaded, fast=False)
    ids = [*text(20, 1), *image_ids(12), *text(30, 2)]
    one, other = picture(4 * side, 3 * side, 1), picture(4 * side, 3 * side, 2)
    finished = [run(core, loaded, ask(ids, [image]))[0] for image in (one, one, other)]
    cached = [running.result.cached_tokens for running in finished if running.result]
    assert cached == [0, len(ids) - 1, 21]
    (turn,) = run(core, loaded, ask([*ids, *finished[1].result.output_ids, *text(9, 3)], [one]))  # type: ignore[union-attr]
    assert turn.result is not None
    assert turn.result.cached_tokens == len(ids) + 11
    VisionReference(folder).check(*finished, turn)
    assert finished[0].ids[21] >= FIRST_LOOKUP_ID


def test_a_group_with_one_image_and_a_group_with_another_do_not_mix(folder: Path, side: int) -> None:
    loaded = load(folder)
    core = make_core(loaded, fast=False)
    ids = [*image_ids(12), *text(30, 2)]
    images = [picture(4 * side, 3 * side, i % 2) for i in range(6)]
    finished = run(core, loaded, *(ask(ids, [image], rid=str(i)) for i, image in enumerate(images)))
    VisionReference(folder).check(*finished)
    assert core.stats.prefilled_tokens == 2 * (len(ids) - 1)


@pytest.mark.parametrize("steps", [1, 8])
def test_a_weight_update_makes_everything_anew_the_tower_included(
    folder: Path, other_folder: Path, side: int, steps: int
) -> None:
    loaded = load(folder)
    core = make_core(loaded, fast=False, chunk=1024 if steps > 1 else 16)
    ids = [*text(9, 1), *image_ids(12), *text(7, 2)]
    image = picture(4 * side, 3 * side)
    running = add(core, loaded, ask(ids, [image], new=20))
    for _ in range(steps):
        core.step()
    loader = WeightLoader(loaded.model)
    loader.swap_in(loader.stage(FolderWeights(other_folder)))
    core.weights_changed("1", "retract")
    while core.busy:
        core.step()
    assert running.result is not None
    sampled = running.result.output_ids
    first = next((span.end for span in running.result.spans if span.version == "0"), 0)
    assert first == (0 if steps == 1 else steps)
    assert sampled[:first] == VisionReference(folder).greedy(ids, [image], 20)[0][:first]
    rest, logprobs = VisionReference(other_folder).greedy([*ids, *sampled[:first]], [image], 20 - first)
    assert sampled[first:] == rest
    assert running.result.logprobs[first:] == pytest.approx(logprobs, abs=TOLERANCE)


def test_requests_with_images_make_way_and_come_back(folder: Path, side: int) -> None:
    loaded = load(folder)
    core = make_core(loaded, fast=False, kv_tokens=340)
    requests = [
        ask([*text(10, i), *image_ids(12), *text(5, i)], [picture(4 * side, 3 * side, i)], new=80, rid=str(i))
        for i in range(6)
    ]
    finished = run(core, loaded, *requests)
    assert core.stats.preempted > 0
    VisionReference(folder).check(*finished)


def test_an_image_token_that_the_model_writes_is_text(folder: Path, side: int) -> None:
    loaded = load(folder)
    core = make_core(loaded, fast=False)
    ids, image = [*text(10, 1), *image_ids(6), *text(5, 2)], picture(3 * side, 2 * side)
    running = add(core, loaded, ask(ids, [image], new=40))
    while len(running.logprobs) < 4:
        core.step()
    core.retract_all()  # what was sampled will be prefilled with the rest
    running.ids.append(PAD)
    running.logprobs.append(0.0)
    while core.busy:
        core.step()
    sampled, logprobs = VisionReference(folder).greedy(ids, [image], 40, forced={4: PAD})
    assert running.result is not None
    assert running.result.output_ids == sampled
    assert running.result.logprobs[5:] == pytest.approx(logprobs[5:], abs=TOLERANCE)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 2.0, "top_k": 2}])
def test_placeholders_are_never_sampled(folder: Path, side: int, options: dict[str, Any]) -> None:
    loaded = load(folder)
    core = make_core(loaded, fast=False)
    biased = request(text(9, 1), new=40, ignore_eos=True, logit_bias={PAD: 50.0, PAD + 1: 50.0}, **options)
    (finished,) = run(core, loaded, biased)
    assert finished.result is not None
    assert len(finished.result.output_ids) == 40
    assert not {PAD, PAD + 1} & set(finished.result.output_ids)
    assert max(finished.result.logprobs) < -20, "logprobs are those of the whole distribution"


def test_three_pixels_of_height_are_no_colours(folder: Path, side: int) -> None:
    loaded = load(folder)
    assert loaded.images is not None
    processor = AutoImageProcessor.from_pretrained(folder)
    count = processor.get_number_of_image_patches(3, 300, {}) // 4
    ids = [*text(3, 1), *image_ids(count), *text(3, 2)]
    VisionReference(folder).check(*run(make_core(loaded, fast=False), loaded, ask(ids, [picture(300, 3)])))
