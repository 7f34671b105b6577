"""Samples for the trainer and requests for the engine, with and without an image."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np

from agentloop.wire import SamplingParams
from rollout_server.engines.base import Generation
from tests.fakecuda.full_size import IMAGE_PAD, PATCH, VISION_END, VISION_START
from trainer.types import TrainSample

HEIGHT, WIDTH = 20 * PATCH, 30 * PATCH
PADS = 10 * 15
"""Tokens of the image: two by two patches each."""


def picture() -> bytes:
    """A file in PNG of HEIGHT x WIDTH pixels."""
    from PIL import Image

    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def prompt_ids(length: int, *, image: bool) -> list[int]:
    """A prompt of `length` tokens and, if wanted, an image before its last ten."""
    ids = np.random.default_rng(length).integers(0, 100_000, length).tolist()
    return [*ids[:-10], VISION_START, *[IMAGE_PAD] * PADS, VISION_END, *ids[-10:]] if image else ids


def samples_of(*, image: bool = False, groups: int = 2, prompt: int = 60) -> list[TrainSample]:
    """Groups of two samples that share a prompt."""
    file = np.frombuffer(picture(), np.uint8)
    rng = np.random.default_rng(1)
    samples = []
    for group in range(groups):
        shared = prompt_ids(prompt + group, image=image)
        for length in (40, 50):
            ids = np.array([*shared, *rng.integers(0, 100_000, length)], dtype=np.int32)
            mask = np.arange(len(ids)) >= len(shared)
            samples.append(
                TrainSample(
                    token_ids=ids,
                    loss_mask=mask,
                    old_logprobs=np.zeros(len(ids), np.float32),
                    advantages=np.where(mask, 1.0, 0.0).astype(np.float32),
                    prompt_length=len(shared),
                    group_key=group,
                    images=[file] if image else [],
                )
            )
    return samples


def generation(rid: str, length: int, *, image: bool = False, **sampling: Any) -> Generation:
    """A request with a prompt of `length` tokens."""
    return Generation(
        rid=rid,
        input_ids=prompt_ids(length, image=image),
        sampling=SamplingParams(ignore_eos=True, **sampling),
        image_data=[base64.b64encode(picture()).decode()] if image else [],
    )
