"""Images, on every target: the tokens and logprobs are those of transformers with the same pixels."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText

from agentloop.wire import LEAST_NAMED_IMAGE, image_name
from rollout_server.placeholders import Placeholders
from rollout_server.replica.starting.sglang import CPU_PLATFORM, CPU_PLATFORM_FOLDER
from tests.conformance.conftest import Answer, Target, wait_until_served
from tests.rollout_server.support import PAD, VISION_END, VISION_START, picture, save_vision_model

TOLERANCE = 5e-4
SIDE = {"qwen2_5_vl": 28, "qwen3_vl": 32}
VIDEO_PAD = 191
PLACEHOLDERS = Placeholders(PAD, (PAD, VIDEO_PAD))

SGLANG = [("qwen2_5_vl", "sglang"), ("qwen2_5_vl", "sglang-server"), ("qwen3_vl", "sglang-server")]
TARGETS = [
    ("qwen2_5_vl", "torch"),
    ("qwen3_vl", "torch"),
    ("qwen2_5_vl", "torch-fleet"),
    *(pytest.param(pair, marks=pytest.mark.sglang) for pair in SGLANG),
]
"""Families and targets. SGLang takes a minute to start, so that it is started three times only."""

OURS = [target for target in TARGETS if "sglang" not in getattr(target, "values", (target,))[0]]
"""Without a bare SGLang, for what our server adds to it."""

NAMED = "-".join


@dataclass
class Seen:
    """A prompt: ids with one placeholder for each token of an image, and its images."""

    ids: list[int]
    images: list[str]

    def then(self, *parts: Any) -> Seen:
        """The prompt, continued by lists of ids and by (image, tokens)."""
        more = Seen(list(self.ids), list(self.images))
        for part in parts:
            if isinstance(part, tuple):
                more.ids += [VISION_START, *[PAD] * part[1], VISION_END]
                more.images.append(part[0])
            else:
                more.ids += part
        return more


class Sight:
    """transformers' own forward pass over ids and pixels, for each version of the weights."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self._models = {
            version: AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
            for version, folder in folders.items()
        }
        self._processor = AutoImageProcessor.from_pretrained(folders["0"])

    @torch.no_grad()
    def check(self, target: Target, seen: Seen, answer: Answer) -> None:
        """The answer is greedy, and has the model's logprobs."""
        ids = torch.tensor([[*seen.ids, *answer.ids]])
        opened = [Image.open(io.BytesIO(base64.b64decode(image))) for image in seen.images]
        logits = self._models[target.version](
            input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == PAD).int(),
            **self._processor(images=opened, return_tensors="pt"),
        ).logits[0, len(seen.ids) - 1 : -1]  # fmt: skip
        banned = logits.index_fill(1, torch.tensor(PLACEHOLDERS.never_sampled), -torch.inf)
        # SGLang has no other way to ban a token than a bias, which its logprobs count.
        table = torch.log_softmax(banned if target.kind == "sglang-server" else logits, -1)
        assert answer.meta["prompt_tokens"] == len(seen.ids)
        for place, (token, logprob) in enumerate(zip(answer.ids, answer.logprobs, strict=True)):
            allowed = logits if target.kind == "sglang" else banned
            assert float(allowed[place].max() - allowed[place, token]) < TOLERANCE
            assert logprob == pytest.approx(float(table[place, token]), abs=TOLERANCE)


async def ask(target: Target, seen: Seen, new: int = 8, **options: Any) -> Answer:
    """A greedy answer; a bare SGLang gets the form of a prompt that our server makes for it."""
    fields: dict[str, Any] = {"image_data": seen.images}
    ids = seen.ids
    if target.kind == "sglang":
        ids = PLACEHOLDERS.collapse(ids)
        salted = [hashlib.sha256((target.version + image).encode()).hexdigest()[:16] for image in seen.images]
        fields["mm_hashes"] = salted  # its cache of images knows no versions
    return await target.generate(ids, new, fields=fields, temperature=0, **options)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Path], Sight]]:
    """Two versions of a tiny model of each family, tower included, and what transformers says of them."""
    made: dict[str, tuple[dict[str, Path], Sight]] = {}

    def get(family: str) -> tuple[dict[str, Path], Sight]:
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            folders = {str(seed): save_vision_model(root / f"v{seed}", family, seed=seed) for seed in (0, 1)}
            made[family] = folders, Sight(folders)
        return made[family]

    return get


@pytest.fixture(scope="module")
def seeing(
    start_target: Callable[..., Target], families: Callable[[str], tuple[dict[str, Path], Sight]]
) -> Callable[[str, str], Target]:
    """The target of a family and kind, started when it is first asked for: a start of SGLang keeps two cores busy."""
    targets: dict[tuple[str, str], Target] = {}
    platform = {"PYTHONPATH": str(CPU_PLATFORM_FOLDER), "SGLANG_PLATFORM": CPU_PLATFORM}

    def get(family: str, kind: str) -> Target:
        if (family, kind) not in targets:
            environment = platform if kind == "sglang" else {}
            targets[family, kind] = start_target(kind, folders=families(family)[0], environment=environment)
        wait_until_served(targets[family, kind])
        return targets[family, kind]

    return get


@pytest.fixture(params=TARGETS, ids=NAMED)
async def case(
    request: pytest.FixtureRequest,
    seeing: Callable[[str, str], Target],
    families: Callable[[str], tuple[dict[str, Path], Sight]],
) -> Any:
    """A target at version 0, its reference, and the side of a token in pixels."""
    family, kind = request.param
    target = seeing(family, kind)
    async with httpx.AsyncClient(base_url=target.url, timeout=120, trust_env=False) as target.http:
        yield target, families(family)[1], SIDE[family]
        if target.version != "0":
            await target.update("0")


Case = tuple[Target, Sight, int]


def text(count: int, seed: int) -> list[int]:
    rnd = random.Random(seed)
    return [rnd.randrange(8, PAD) for _ in range(count)]


def image(side: int, wide: int, high: int, seed: int) -> tuple[str, int]:
    return picture(wide * side, high * side, seed), wide * high


async def test_two_images_in_a_prompt_and_one_in_a_later_turn(case: Case) -> None:
    target, sight, side = case
    first = Seen([], []).then(text(5, 1), image(side, 3, 2, 1), image(side, 1, 4, 2), text(6, 2))
    answer = await ask(target, first, session="s")
    sight.check(target, first, answer)
    second = first.then(answer.ids, text(3, 3), image(side, 4, 3, 3), text(4, 4))
    again = await ask(target, second, session="s")
    sight.check(target, second, again)
    # The first turn is in the cache, images included; the last sampled token may be missing.
    assert again.meta["cached_tokens"] >= len(first.ids) + len(answer.ids) - 1


async def test_another_image_is_another_prompt(case: Case) -> None:
    target, sight, side = case
    seen = [Seen([], []).then(text(20, 5), image(side, 3, 3, seed), text(6, 6)) for seed in (4, 5, 4)]
    answers = [await ask(target, one) for one in seen]
    for one, answer in zip(seen, answers, strict=True):
        sight.check(target, one, answer)
    assert answers[0].logprobs == pytest.approx(answers[2].logprobs, abs=TOLERANCE)
    assert answers[0].logprobs != pytest.approx(answers[1].logprobs, abs=10 * TOLERANCE)
    shared = answers[1].meta["cached_tokens"]
    assert shared <= 21, "the text before the image at most"


async def test_requests_with_other_images_run_beside_each_other(case: Case) -> None:
    target, sight, side = case
    prompts = [
        Seen([], []).then(text(2 + i, i), image(side, 1 + i, 2, i), text(3, 50 + i)) for i in range(4)
    ] + [Seen(text(9, 7), []).then(image(side, 2, 2, 8), [9], image(side, 2, 2, 9), [10])]  # fmt: skip
    for one, answer in zip(prompts, await asyncio.gather(*(ask(target, one) for one in prompts)), strict=True):
        sight.check(target, one, answer)


async def test_after_new_weights_an_image_is_looked_at_again(case: Case) -> None:
    target, sight, side = case
    seen = Seen([], []).then(text(5, 11), image(side, 3, 2, 11), text(4, 12))
    sight.check(target, seen, await ask(target, seen))
    for version in ("1", "0"):
        await target.update(version)
        sight.check(target, seen, await ask(target, seen))


@pytest.mark.parametrize("case", OURS, ids=NAMED, indirect=True)
async def test_placeholders_are_never_sampled(case: Case) -> None:
    """A bare SGLang bans no token."""
    target, _, side = case
    seen = Seen([], []).then(text(5, 13), image(side, 2, 2, 13), text(4, 14))
    for options in ({"temperature": 0}, {"temperature": 1.5}, {"temperature": 1.0, "top_k": 3}):
        answer = await target.generate(
            seen.ids, 30, fields={"image_data": seen.images}, logit_bias={str(PAD): 50, str(VIDEO_PAD): 50}, **options
        )
        assert not {PAD, VIDEO_PAD} & set(answer.ids)


@pytest.mark.parametrize("case", OURS, ids=NAMED, indirect=True)
async def test_images_that_do_not_fit_the_prompt_are_refused_and_hurt_nobody(case: Case) -> None:
    """A bare SGLang answers some of them with wrong tokens, and some with a 500."""
    target, sight, side = case
    seen = Seen([], []).then(text(5, 15), image(side, 3, 2, 15), text(4, 16))
    other = picture(5 * side, 2 * side, 1)
    wrong = [
        (seen.ids, []),
        (seen.ids, [*seen.images, other]),
        (text(9, 1), seen.images),
        (seen.ids, [other]),
        (seen.ids, [base64.b64encode(b"no image").decode()]),
        (seen.ids, ["file:///etc/hostname"]),
    ]
    answering = asyncio.create_task(ask(target, seen, 60))
    for ids, images in wrong:
        response = await target.post(
            "/generate", input_ids=ids, image_data=images, sampling_params={"max_new_tokens": 2}, return_logprob=True
        )
        assert 400 <= response.status_code < 500, (response.status_code, response.text)
        assert response.json()["error"]["message"]
    sight.check(target, seen, await answering)


async def test_an_image_that_was_sent_may_be_named(case: Case) -> None:
    target, sight, side = case
    facts = (await target.http.get("/server_info")).json()
    assert facts.get("keeps_images", False) is target.ours
    if not target.ours:
        return  # our client sends a bare SGLang whole images
    seen = Seen([], []).then(text(5, 17), image(side, 6, 5, 17), text(4, 18))
    assert len(seen.images[0]) >= LEAST_NAMED_IMAGE
    named = Seen(seen.ids, [image_name(image) for image in seen.images])
    response = await target.post("/generate", input_ids=named.ids, image_data=named.images)
    assert response.status_code == 409 and response.json()["error"]["type"] == "unknown_image"
    whole = await ask(target, seen, session="named")
    again = await ask(target, named, session="named")
    assert again.ids == whole.ids
    for answer in (whole, again):
        sight.check(target, seen, answer)


@pytest.mark.sglang
async def test_two_processes_of_tensor_parallelism_see_images_and_take_new_weights(
    start_target: Callable[..., Target], families: Callable[[str], tuple[dict[str, Path], Sight]]
) -> None:
    folders, sight = families("qwen2_5_vl")
    target = start_target("sglang-server", folders=folders, options=["--gpus-per-replica", "2"])
    wait_until_served(target)
    seen = Seen([], []).then(text(5, 19), image(28, 3, 2, 19), text(4, 20))
    async with httpx.AsyncClient(base_url=target.url, timeout=120, trust_env=False) as target.http:
        sight.check(target, seen, await ask(target, seen))
        for version in ("1", "0"):
            await target.update(version)
            sight.check(target, seen, await ask(target, seen))
