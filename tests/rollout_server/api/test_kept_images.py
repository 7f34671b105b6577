"""Images that requests name: kept within a bound, put in place before anything looks at them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from agentloop.wire import LEAST_NAMED_IMAGE, GenerateRequest, SamplingParams, image_name
from rollout_server.api.kept_images import KeptImages
from rollout_server.engines.base import EngineInfo, Generation
from rollout_server.errors import RequestError, UnknownImage
from rollout_server.replica.http import HttpReplica

LARGE, OTHER = "a" * LEAST_NAMED_IMAGE, "b" * 3000


def request(images: Any) -> GenerateRequest:
    return GenerateRequest(input_ids=[1], image_data=images)


def test_names_are_replaced_by_what_was_sent() -> None:
    kept = KeptImages()
    kept.put_in_place([request([LARGE, "tiny"])])
    kept.put_in_place([request(OTHER)])
    named, single, none = (
        request([image_name(OTHER), "x", image_name(LARGE)]),
        request(image_name(LARGE)),
        request(None),
    )
    for one in (named, single, none):
        kept.put_in_place([one])
    assert (named.image_data, single.image_data, none.image_data) == ([OTHER, "x", LARGE], LARGE, None)


@pytest.mark.parametrize("name", [image_name("tiny"), image_name(OTHER), "sha256:", "sha256:../../etc/passwd"])
def test_a_name_without_an_image_is_refused(name: str) -> None:
    kept = KeptImages()
    kept.put_in_place([request([LARGE, "tiny"])])
    with pytest.raises(UnknownImage, match="send the images whole") as refused:
        kept.put_in_place([request([LARGE, name])])
    assert refused.value.field == "image_data"


def test_the_images_that_were_not_used_for_longest_make_way() -> None:
    kept = KeptImages(most_bytes=3 * LEAST_NAMED_IMAGE)
    first, second, third, fourth = (letter * LEAST_NAMED_IMAGE for letter in "abcd")
    kept.put_in_place([request([first, second, third])])
    kept.put_in_place([request([image_name(first)])])
    kept.put_in_place([request([fourth])])
    kept.put_in_place([request([image_name(first), image_name(third), image_name(fourth)])])
    with pytest.raises(UnknownImage):
        kept.put_in_place([request([image_name(second)])])
    for _ in range(100):  # the same image again takes nothing
        kept.put_in_place([request([fourth])])
    kept.put_in_place([request([image_name(first)])])


def test_a_batch_names_no_images() -> None:
    """Its bound on characters of all answers counts what was sent."""
    kept = KeptImages()
    kept.put_in_place([request([LARGE])])
    with pytest.raises(RequestError, match="the images of a batch cannot be named"):
        kept.put_in_place([request([image_name(LARGE)]), request([image_name(LARGE)])])


async def test_a_replica_is_sent_an_image_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = EngineInfo("torch", str(tmp_path), 100, 50, images=True)
    got: list[list[str]] = []
    kept = KeptImages()

    async def sent(self: HttpReplica, head: bytes, body: bytes, *_: Any) -> tuple[int, bytes]:
        one = GenerateRequest.model_validate_json(body)
        assert isinstance(one.image_data, list)
        got.append(list(one.image_data))
        try:
            kept.put_in_place([one])
        except UnknownImage as exc:
            return 409, orjson.dumps({"error": {"message": exc.message, "type": "unknown_image", "field": exc.field}})
        meta = {
            "id": "r", "finish_reason": {"type": "length", "length": 1}, "prompt_tokens": 1, "completion_tokens": 1,
            "cached_tokens": 0, "weight_version": "0", "output_token_logprobs": [[-0.5, 7, None]],
        }  # fmt: skip
        return 200, orjson.dumps({"output_ids": [7], "meta_info": meta})

    monkeypatch.setattr(HttpReplica, "_send", sent)
    replica = HttpReplica("r", "http://127.0.0.1:9", info, keeps_images=True)

    async def generate() -> None:
        sampling = SamplingParams(max_new_tokens=1)
        result = await replica.generate(Generation("r", [1], sampling, image_data=[LARGE, "tiny"]))
        assert result.output_ids == [7]

    await generate()
    await generate()
    kept = KeptImages()  # it was started again
    await generate()
    named = [image_name(LARGE), "tiny"]
    assert got == [[LARGE, "tiny"], named, named, [LARGE, "tiny"]]
    await replica.close()
