"""Conversations with images: what the engine samples in several turns, the trainer computes from one packed batch."""

from __future__ import annotations

import base64
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentloop.types import EpisodeStatus, Trajectory
from agentloop.wire import SamplingParams
from rollout_server.engines.base import FolderWeights, Generation
from rollout_server.engines.torch_engine.core import Core
from rollout_server.engines.torch_engine.model.models import LoadedModel, load_model
from rollout_server.engines.torch_engine.weights.loader import WeightLoader
from tests.rollout_server.support import make_core
from tests.trainer.conftest import samples_of
from tests.trainer.learner.model.test_vision import by_transformers, grouped, picture, words
from tests.trainer.learner.test_learner import learner
from tests.trainer.models import PAD, VISION_END, VISION_START, save_tiny
from trainer.channel import arrays_to_samples, samples_to_arrays
from trainer.learner.learner import Learner
from trainer.types import LossSpec, TrainSample

pytestmark = pytest.mark.usefixtures("process_group")

TOLERANCE = 1e-4


@dataclass
class Engine:
    """The torch engine, for one conversation at a time."""

    loaded: LoadedModel
    core: Core

    @classmethod
    def of(cls, model: Path) -> Engine:
        loaded = load_model(str(model), dtype=torch.float32, device=torch.device("cpu"), context_length=None)
        return cls(loaded, make_core(loaded, fast=False, kv_tokens=4096, chunk=16))

    def load(self, folder: Path) -> None:
        loader = WeightLoader(self.loaded.model)
        loader.swap_in(loader.stage(FolderWeights(folder)))
        self.core.weights_changed("1", "retract")

    def talk(self, *parts: Any, seed: int = 0, new: int = 5) -> Trajectory:
        """A conversation: lists of ids and images are observed, and None stands for a turn of `new` tokens."""
        ids: list[int] = []
        images: list[np.ndarray] = []
        made = Trajectory([], [], [], [], 0, status=EpisodeStatus.OK, reward=float(seed))
        for number, part in enumerate([*parts, None]):
            if part is None:
                made.prompt_length = made.prompt_length or len(ids)
                result = self._sample(ids, images, seed=100 * seed + number, new=new)
                ids = [*ids, *result.output_ids]
                made.loss_mask += [1] * new
                made.logprobs += result.logprobs
                made.versions += [0] * new
                continue
            if isinstance(part, tuple):
                images.append(part[0])
                part = [VISION_START, *[PAD] * part[1], VISION_END]
            ids = [*ids, *part]
            made.loss_mask += [0] * len(part)
            made.logprobs += [None] * len(part)
            made.versions += [None] * len(part)
        made.token_ids = ids
        made.images = [{"bytes": image.tobytes()} for image in images]
        return made

    def _sample(self, ids: list[int], images: list[np.ndarray], seed: int, new: int) -> Any:
        sampling = SamplingParams(max_new_tokens=new, temperature=1.0, sampling_seed=seed, ignore_eos=True)
        data = [base64.b64encode(image.tobytes()).decode() for image in images]
        assert self.loaded.images is not None
        running = self.core.add(Generation("r", ids, sampling, image_data=data), self.loaded.images.read(ids, data))
        while self.core.busy:
            self.core.step()
        return running.result


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("turns") / request.param, request.param)


def conversations(engine: Engine, model: Path) -> list[TrainSample]:
    """Images in the first prompt, in a tool's answer, in two turns, side by side, of five sizes; and none."""
    sizes = [(3, 2), (1, 4), (5, 3), (2, 2), (4, 1)]
    wide, tall, large, small, flat = (picture(model, *size, seed) for seed, size in enumerate(sizes))
    opening = [words(4, 1), wide, words(3, 2)]
    groups = [
        [engine.talk(*opening, seed=1), engine.talk(*opening, None, words(2, 3), tall, words(3, 4), seed=2)],
        [engine.talk(words(6, 5), None, words(2, 6), large, words(2, 7), None, words(3, 8), seed=3)],
        [engine.talk(small, words(3, 9), None, flat, words(2, 10), None, words(1, 11), wide, tall, [5], seed=4)],
        [engine.talk(words(9, 12), None, words(4, 13), seed=5)],
    ]
    samples: list[TrainSample] = []
    for number, group in enumerate(groups):
        of_group = samples_of(replace(grouped(*group), index=number), "grpo", PAD)
        for sample in of_group:
            sample.advantages[sample.loss_mask] = 1.0
        samples += of_group
    assert len({sample.group_key for sample in samples}) == 4, "the first two share their prompt, image included"
    return arrays_to_samples(samples_to_arrays(samples), TrainSample)


def worst(of: Learner, samples: list[TrainSample], *, reference: bool = False) -> float:
    """The largest difference between the logprobs of the trainer and those that the engine noted."""
    index, token, ours = of.logprobs(samples, 1.0, "reference" if reference else "policy")
    return max(
        float(np.abs(ours[index == i] - sample.old_logprobs[token[index == i]]).max())
        for i, sample in enumerate(samples)
    )


@pytest.mark.parametrize("budget", [8192, 64], ids=["one micro-batch", "several"])
def test_logprobs_of_turns_with_images_are_the_engines_and_those_of_transformers(model: Path, budget: int) -> None:
    samples = conversations(Engine.of(model), model)
    of = learner(model, tokens_per_micro_batch=budget)
    assert worst(of, samples) < TOLERANCE
    index, token, ours = of.logprobs(samples, 1.0)
    for i, expected in enumerate(by_transformers(model, samples)[1]):
        order = np.argsort(token[index == i])
        assert np.abs(ours[index == i][order] - expected.numpy()).max() < 1e-5, i


@pytest.mark.parametrize(
    "options", [{"freeze_vision": True}, {"freeze_vision": False}, {"lora": {"rank": 4, "alpha": 64.0}}], ids=str
)
def test_after_a_step_the_engine_samples_what_the_trainer_computes(
    model: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    engine = Engine.of(model)
    before = conversations(engine, model)
    of = learner(model, reference=True, **options)
    of.step(of.accumulate(before, 1.0, LossSpec())["tokens"])
    assert worst(of, before) > 10 * TOLERANCE, "the step changed the policy"
    assert worst(of, before, reference=True) < TOLERANCE

    of.publish(tmp_path / "v_1")
    engine.load(tmp_path / "v_1")
    after = conversations(engine, model)
    assert worst(of, after) < TOLERANCE
    assert worst(of, after, reference=True) > 10 * TOLERANCE
