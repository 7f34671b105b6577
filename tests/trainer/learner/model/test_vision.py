"""Vision-language models: the trainer computes what the engine sampled from, images and their positions included."""

from __future__ import annotations

import asyncio
import base64
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from agentloop.config import TrainerConfig
from agentloop.errors import DataError
from agentloop.types import EpisodeStatus, Task, Trajectory
from agentloop.wire import SamplingParams
from rollout_server.engines.base import FolderWeights, Generation
from rollout_server.engines.torch_engine.model.models import load_model
from rollout_server.engines.torch_engine.weights.loader import WeightLoader
from tests.rollout_server.support import make_core
from tests.trainer.conftest import samples_of, start_workers
from tests.trainer.learner.test_learner import learner, relative
from tests.trainer.models import PAD, VISION_END, VISION_START, save_tiny
from trainer.channel import arrays_to_samples, samples_to_arrays
from trainer.packing.units import plan_units, split_over_ranks
from trainer.rollouts.producer import Group
from trainer.types import LossSpec, TrainSample

pytestmark = pytest.mark.usefixtures("process_group")

SIDE = {"qwen2_vl": 28, "qwen2_5_vl": 28, "qwen3_vl": 32}


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("vl") / request.param, request.param)


def picture(model: Path, wide: int, high: int, seed: int) -> tuple[np.ndarray, int]:
    """The file of a picture of random colours that becomes `wide` x `high` tokens."""
    side = SIDE[model.name]
    pixels = random.Random(seed).randbytes(3 * wide * high * side * side)
    buffer = io.BytesIO()
    Image.frombytes("RGB", (wide * side, high * side), pixels).save(buffer, "PNG")
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8), wide * high


def make_sample(prompt: list[Any], completion: list[Any], key: int, seed: int = 0) -> TrainSample:
    """Ids and pictures in their order; of the completion the ids are trained."""
    ids: list[int] = []
    mask: list[bool] = []
    images = []
    prompt_length = 0
    for number, part in enumerate([*prompt, None, *completion]):
        if part is None:
            prompt_length = len(ids)
        elif isinstance(part, tuple):
            images.append(part[0])
            ids += [VISION_START, *[PAD] * part[1], VISION_END]
            mask += [False] * (part[1] + 2)
        else:
            ids += part
            mask += [number > len(prompt)] * len(part)
    trained = np.array(mask)
    return TrainSample(
        token_ids=np.array(ids),
        loss_mask=trained,
        old_logprobs=np.where(trained, -4.0, 0.0).astype(np.float32),
        advantages=np.where(trained, 1.0 - 2 * (seed % 2), 0.0).astype(np.float32),
        prompt_length=prompt_length,
        group_key=key,
        images=tuple(images),
    )


def words(count: int, seed: int) -> list[int]:
    rnd = random.Random(seed)
    return [rnd.randrange(2, PAD) for _ in range(count)]


def mixed(model: Path) -> list[TrainSample]:
    """A group with a picture in its shared prompt, one of whose samples gets another from a tool; one of text alone;
    one with the first's ids and another picture."""
    first, other, third = (picture(model, wide, high, seed) for wide, high, seed in ((3, 2, 1), (3, 2, 2), (1, 4, 3)))
    prompt = [words(4, 0), first, words(3, 1)]
    return [
        make_sample(prompt, [words(6, 2)], key=0, seed=0),
        make_sample(prompt, [words(3, 3), third, words(4, 4)], key=0, seed=1),
        make_sample([words(5, 5)], [words(7, 6)], key=1, seed=0),
        make_sample([words(4, 0), other, words(3, 1)], [words(5, 7)], key=2, seed=1),
    ]


def by_transformers(model: Path, samples: list[TrainSample], *, train: bool = False) -> tuple[Any, list[torch.Tensor]]:
    """Logprobs of the trained tokens from transformers' own forward pass, a sample at a time."""
    lm = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    processor = AutoImageProcessor.from_pretrained(model)
    found = []
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids).long()
        inputs: dict[str, Any] = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
        if sample.images:
            opened = [Image.open(io.BytesIO(image.tobytes())) for image in sample.images]
            inputs |= dict(processor(images=opened, return_tensors="pt"))
            inputs["mm_token_type_ids"] = (ids == PAD).int()[None]
        with torch.set_grad_enabled(train):
            table = torch.log_softmax(lm(**inputs).logits[0, :-1], -1)
        found.append(table.gather(1, ids[1:, None])[:, 0][torch.from_numpy(sample.loss_mask[1:])])
    return lm, found


@pytest.mark.parametrize("kind", SIDE)
def test_packed_logprobs_with_images_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / kind, kind)
    samples = mixed(model)
    assert len(plan_units(samples, 10_000)) == 3
    index, token, ours = learner(model).logprobs(samples, 1.0)
    for i, expected in enumerate(by_transformers(model, samples)[1]):
        rows = index == i
        order = np.argsort(token[rows])
        assert np.abs(ours[rows][order] - expected.numpy()).max() < 1e-5, i


@pytest.mark.parametrize("freeze", [True, False])
def test_the_gradient_is_that_of_transformers(model: Path, freeze: bool) -> None:
    samples = mixed(model)
    of = learner(model, freeze_vision=freeze)
    of.accumulate(samples, 1.0, LossSpec(kind="sft"))
    plain, logprobs = by_transformers(model, samples, train=True)
    (-torch.cat(logprobs).sum()).backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in of.policy.lm.named_parameters():
        frozen = freeze and "visual" in name
        assert parameter.requires_grad is not frozen
        if frozen:
            assert parameter.grad is None
        else:
            ours, expected = parameter.grad.to_local(), theirs[name].grad
            assert (ours - expected).norm() <= 1e-4 * expected.norm(), name


def test_the_gradient_does_not_depend_on_micro_batches(model: Path) -> None:
    samples = [*mixed(model), *mixed(model)]
    for sample in samples[4:]:
        sample.group_key += 10
    whole, cut = learner(model), learner(model, tokens_per_micro_batch=64)
    sums = [of.accumulate(samples, 1.0, LossSpec()) for of in (whole, cut)]
    assert sums[0]["micro_batches"] == 1 < sums[1]["micro_batches"]
    grads = [
        torch.cat([p.grad.to_local().flatten() for p in of.policy.parameters() if p.grad is not None])
        for of in (whole, cut)
    ]
    assert relative(grads[1], grads[0]) < 5e-6


def grouped(*trajectories: Trajectory) -> Group:
    task = Task(task_id="t", agent_name="a", prompt=[])
    return Group(0, task, [[trajectory] for trajectory in trajectories], 0.0, 0.0)


def test_logprobs_are_the_engines_own(model: Path) -> None:
    """What the torch engine sampled and noted, from the same files."""
    loaded = load_model(str(model), dtype=torch.float32, device=torch.device("cpu"), context_length=None)
    image, pads = picture(model, 4, 2, 8)
    prompt = [*words(5, 1), VISION_START, *[PAD] * pads, VISION_END, *words(4, 2)]
    text = base64.b64encode(image.tobytes()).decode()
    core = make_core(loaded, fast=False)
    groups = []
    for seed in range(3):
        ask = Generation(
            f"r{seed}", prompt, SamplingParams(max_new_tokens=6, temperature=1.0, sampling_seed=seed, ignore_eos=True)
        )
        ask.image_data = [text]
        groups.append(core.add(ask, loaded.images.read(prompt, [text])))
    while core.busy:
        core.step()
    trajectories = []
    for running in groups:
        result = running.result
        new = len(result.output_ids)
        trajectories.append(
            Trajectory(
                token_ids=[*prompt, *result.output_ids],
                loss_mask=[0] * len(prompt) + [1] * new,
                logprobs=[None] * len(prompt) + list(result.logprobs),
                versions=[None] * len(prompt) + [0] * new,
                prompt_length=len(prompt),
                images=[{"bytes": image.tobytes()}],
                reward=float(len(trajectories)),
                status=EpisodeStatus.OK,
            )
        )
    samples = samples_of(grouped(*trajectories), "grpo", PAD)
    samples = arrays_to_samples(samples_to_arrays(samples), TrainSample)
    assert len({sample.group_key for sample in samples}) == 1, "the prompt is shared"
    index, token, ours = learner(model).logprobs(samples, 1.0)
    for i, sample in enumerate(samples):
        assert np.abs(ours[index == i] - sample.old_logprobs[token[index == i]]).max() < 1e-4


def test_prompts_with_other_images_are_not_shared(model: Path) -> None:
    a, b = (picture(model, 2, 2, seed)[0] for seed in (1, 2))
    ids = [*words(3, 0), VISION_START, *[PAD] * 4, VISION_END, *words(2, 1), 5, 6]

    def trajectory(image: np.ndarray) -> Trajectory:
        n = len(ids)
        return Trajectory(
            ids, [0] * (n - 2) + [1, 1], [None] * (n - 2) + [-1.0] * 2, [None] * (n - 2) + [0] * 2, n - 2,
            images=[{"bytes": image.tobytes()}], reward=1.0,
        )  # fmt: skip

    same = grouped(trajectory(a), trajectory(b), trajectory(a))
    keys = [sample.group_key for sample in samples_of(same, "grpo", PAD)]
    assert keys[0] == keys[2] != keys[1]


def test_images_that_do_not_fit_their_places_are_refused(model: Path) -> None:
    of = learner(model)
    sample = mixed(model)[0]
    sample.images = ()
    with pytest.raises(DataError, match="0 images but 1 runs"):
        of.logprobs([sample], 1.0)
    sample.images = (picture(model, 2, 2, 1)[0],)
    with pytest.raises(DataError, match="takes 4 tokens, but the trajectory holds 6 pad"):
        of.logprobs([sample], 1.0)


def test_images_cross_the_channel_once_each(model: Path) -> None:
    samples = mixed(model)
    arrays = samples_to_arrays(samples)
    assert len(arrays[6]) == 3, "lengths of the distinct images"
    for before, after in zip(samples, arrays_to_samples(arrays, TrainSample), strict=True):
        assert [image.tobytes() for image in before.images] == [image.tobytes() for image in after.images]


def test_a_vision_model_is_published_saved_and_resumed(model: Path, tmp_path: Path) -> None:
    samples = mixed(model)
    of = learner(model)
    of.step(of.accumulate(samples, 1.0, LossSpec())["tokens"])
    of.publish(tmp_path / "v_1")
    of.save(tmp_path / "step_1", {})
    _, _, expected = of.logprobs(samples, 1.0)
    again = learner(model)
    again.load(tmp_path / "step_1" / "trainer", optimizer=True)
    assert np.array_equal(again.logprobs(samples, 1.0)[2], expected)
    processor = "preprocessor_config.json"
    (tmp_path / "v_1" / processor).write_bytes((model / processor).read_bytes())
    published = torch.cat(by_transformers(tmp_path / "v_1", samples)[1]).numpy()
    assert np.abs(np.sort(published) - np.sort(expected)).max() < 1e-5
    loaded = load_model(str(model), dtype=torch.float32, device=torch.device("cpu"), context_length=None)
    loader = WeightLoader(loaded.model)
    loader.swap_in(loader.stage(FolderWeights(tmp_path / "v_1")))
    of.policy.reshard()
    own = {name: p.to_local() for name, p in of.policy.lm.named_parameters()}
    assert all(torch.equal(p, own[name]) for name, p in loaded.model.named_parameters()), "the engine took all of it"


async def test_a_rank_without_images_waits_for_nobody(tmp_path: Path) -> None:
    """Two ranks, of which one has all the images; the tower is trained, with activations computed again."""
    model = save_tiny(tmp_path / "qwen3_vl", "qwen3_vl")
    samples = [*mixed(model)[:2], make_sample([words(5, 5)], [words(40, 6)], key=1)]
    shares = split_over_ranks(samples, 2, 8192, 32)
    assert sorted(sum(len(samples[i].images) for i in share) for share in shares) == [0, 3]
    options = {"freeze_vision": False, "optim": {"lr": 1e6, "eps": 1e6, "grad_clip": 1e9}}
    one = learner(model, **options)
    one.accumulate(samples, 1.0, LossSpec())
    one.step(1.0)
    one.publish(tmp_path / "one")
    config = TrainerConfig.model_validate(options | {"ranks": 2, "fsdp": {"activation_checkpointing": True}})
    workers = await start_workers(
        model_path=str(model), config=config, dtype="float32", total_steps=1, seed=0, log_dir=tmp_path / "logs"
    )
    try:
        async with asyncio.timeout(120):  # a collective that the other rank never joins waits for half an hour
            await workers.accumulate(samples, temperature=1.0, loss=LossSpec())
        await workers.step(1.0)
        await workers.publish(tmp_path / "two")
    finally:
        await workers.close()
    before, *after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "one", tmp_path / "two"))
    own = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): name for name in after[0]
    }
    for name, start in before.items():
        first, second = (tensors[own.get(name, name)] - start for tensors in after)
        assert (second - first).norm() <= 1e-4 * first.norm() + 1e-6, name
