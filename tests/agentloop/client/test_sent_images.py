"""An image is sent once to a server that keeps it, and whole again when that has dropped it."""

from __future__ import annotations

from typing import Any

import httpx
import orjson
import pytest

from agentloop.client.client import GenerateClient
from agentloop.client.sent_images import SentImages
from agentloop.errors import RequestRejected
from agentloop.wire import IMAGE_NAME, LEAST_NAMED_IMAGE, SamplingParams, image_name

LARGE, OTHER, SMALL = "a" * LEAST_NAMED_IMAGE, "b" * 3000, "c" * 100
ANSWER = {
    "output_ids": [7],
    "meta_info": {
        "id": "r", "finish_reason": {"type": "length", "length": 1}, "prompt_tokens": 2, "completion_tokens": 1,
        "cached_tokens": 0, "weight_version": "3", "output_token_logprobs": [[-0.5, 7, None]],
    },
}  # fmt: skip


class Server:
    """Keeps images, as the rollout server does, and the `image_data` of each request."""

    def __init__(self, *, keeps: bool = True) -> None:
        self.keeps = keeps
        self.kept: set[str] = set()
        self.got: list[list[str]] = []
        self.forgets_at_once = False

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/server_info":
            return httpx.Response(200, json={"context_length": 100, "keeps_images": self.keeps})
        images = orjson.loads(request.content)["image_data"]
        self.got.append(images)
        if not self.forgets_at_once:
            self.kept |= {image_name(image) for image in images if not image.startswith(IMAGE_NAME)}
        if self.forgets_at_once or not self.kept.issuperset(i for i in images if i.startswith(IMAGE_NAME)):
            error = {"message": "a named image is not kept here", "type": "unknown_image", "field": "image_data"}
            return httpx.Response(409, json={"error": error})
        return httpx.Response(200, json=ANSWER)


async def client_of(server: Server) -> GenerateClient:
    client = GenerateClient("http://server", transport=httpx.MockTransport(server), retries=0)
    await client.context_length()
    return client


async def send(client: GenerateClient, *images: str) -> Any:
    return await client.generate([1, 2], SamplingParams(max_new_tokens=1), session_id="s", rid="r", image_data=images)


async def test_an_image_is_sent_once_and_named_afterwards() -> None:
    server = Server()
    client = await client_of(server)
    await send(client, LARGE, SMALL)
    await send(client, LARGE, SMALL, OTHER)
    await send(client, OTHER, LARGE)
    named = image_name(LARGE), image_name(OTHER)
    assert server.got == [[LARGE, SMALL], [named[0], SMALL, OTHER], [named[1], named[0]]]


async def test_a_server_that_dropped_an_image_gets_it_again() -> None:
    server = Server()
    client = await client_of(server)
    await send(client, LARGE, OTHER)
    server.kept.clear()
    assert (await send(client, LARGE, OTHER)).token_ids == [7]
    assert server.got[1:] == [[image_name(LARGE), image_name(OTHER)], [LARGE, OTHER]]
    await send(client, LARGE)
    assert server.got[-1] == [image_name(LARGE)]


async def test_a_server_that_refuses_whole_images_too_is_not_asked_without_end() -> None:
    server = Server()
    client = await client_of(server)
    await send(client, LARGE)
    server.forgets_at_once = True
    with pytest.raises(RequestRejected, match="a named image is not kept here"):
        await send(client, LARGE)
    assert len(server.got) == 3


async def test_a_server_that_keeps_none_gets_them_whole() -> None:
    server = Server(keeps=False)
    client = await client_of(server)
    for _ in range(2):
        await send(client, LARGE)
    assert server.got == [[LARGE]] * 2


async def test_an_image_of_a_request_that_failed_is_not_taken_as_sent() -> None:
    server = Server()
    client = await client_of(server)
    server.forgets_at_once = True
    with pytest.raises(RequestRejected):
        await send(client, LARGE)
    server.forgets_at_once = False
    await send(client, LARGE)
    assert server.got[-1] == [LARGE]


async def test_all_names_are_forgotten_with_the_first_that_is_unknown() -> None:
    """A server that restarted has none of them: each would cost a request of its own."""
    server = Server()
    client = await client_of(server)
    await send(client, LARGE)
    await send(client, OTHER)
    server.kept.clear()
    await send(client, LARGE)
    await send(client, OTHER)
    assert server.got[2:] == [[image_name(LARGE)], [LARGE], [OTHER]]


def test_names_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentloop.client.sent_images.MOST_NAMES", 1)
    sent = SentImages()
    sent.sent([LARGE, OTHER])
    assert sent.named([LARGE]) == [image_name(LARGE)]
    sent.sent([OTHER])
    assert sent.named([LARGE, OTHER]) == [LARGE, image_name(OTHER)]
