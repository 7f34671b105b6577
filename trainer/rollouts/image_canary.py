"""The image canary: before a run starts, a swapped image must change what the model answers.

A server that drops the images of requests still answers, fluently and with plausible logprobs, and
the run learns to guess. So the first prompts with images are sent three times: twice as they are,
which shows how much answers differ by rounding, and once with each image replaced by noise of its
size.
"""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from agentloop.chat import ChatRenderer
from agentloop.client.client import GenerateResult, Generator
from agentloop.errors import DataError, ModelError
from agentloop.images import image_data, images_of, read_image
from agentloop.types import Task
from agentloop.wire import SamplingParams

SEARCHED_ROWS = 256
"""Rows of a data set that are searched for images."""

PROMPTS = 3
"""Prompts that are tried until one shows a difference."""

TOKENS = 16
"""Tokens of an answer. The first ones may be certain whatever the image shows."""

Tools = list[dict[str, Any]] | None

ROUNDING = 1e-5
"""Differences of logprobs up to this, and up to twice those of a repeated request, prove nothing.
"""


async def check_images_are_seen(
    generator: Generator, renderer: ChatRenderer, rows: Sequence[Task], tools: Tools, context_length: int
) -> None:
    """Ask the server about the first rows with images; do nothing if there are none.

    Args:
        tools: schemas that the prompts show.
        context_length: of the server's model.

    Raises:
        ModelError: the answers do not depend on the images.
        ServerError: the server did not answer.
        RequestRejected: the server refused a prompt.
    """
    if renderer.image_token is None:
        return

    prompts = (prompt for prompt in _prompts(renderer, rows, tools) if len(prompt[0]) + TOKENS <= context_length)
    asked = 0
    for ids, images in islice(prompts, PROMPTS):
        if await _depends_on_images(generator, ids, images, f"image-canary/{asked}"):
            return
        asked += 1

    if asked:
        raise ModelError(
            f"the rollout server does not see the images: with noise in their place, its greedy answers to {asked} "
            "prompts are the same",
            "check that it serves the vision-language model of model.path and that its version supports images; if "
            "the answers are really the same whatever the images show, set rollout.image_canary=false",
        )


def _prompts(renderer: ChatRenderer, rows: Sequence[Task], tools: Tools) -> Iterator[tuple[list[int], list[str]]]:
    """Yield ids and images of the rows that show an image."""
    for row in islice(rows, SEARCHED_ROWS):
        try:
            images = [image_data(read_image(image)) for image in images_of(row.prompt)]  # as episodes send them
            if images:
                yield renderer.start(row.prompt, tools), images
        except DataError:
            continue  # a broken image fails the episodes of its row, not the run


async def _depends_on_images(generator: Generator, ids: list[int], images: list[str], session: str) -> bool:
    swapped = [_noise(image) for image in images]
    answers = [
        await generator.generate(
            ids,
            SamplingParams(max_new_tokens=TOKENS, temperature=0.0),
            session_id=session,
            rid=f"{session}/{number}",
            image_data=sent,
        )
        for number, sent in enumerate((images, images, swapped))
    ]
    first, repeated, other = answers
    rounding = _difference(first, repeated)
    return _difference(first, other) > max(2 * rounding, ROUNDING)


def _difference(a: GenerateResult, b: GenerateResult) -> float:
    """Return the largest difference of logprobs up to the first token that differs."""
    largest = 0.0
    for token_a, token_b, logprob_a, logprob_b in zip(a.token_ids, b.token_ids, a.logprobs, b.logprobs, strict=False):
        largest = max(largest, abs(logprob_a - logprob_b))
        if token_a != token_b:
            break
    return largest


def _noise(image: str) -> str:
    """Return an image of the same size with values that have nothing to do with it."""
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(image))) as opened:
        size = opened.size
    tile = Image.frombytes("RGB", (16, 16), random.Random(0).randbytes(16 * 16 * 3))
    buffer = io.BytesIO()
    tile.resize(size).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
