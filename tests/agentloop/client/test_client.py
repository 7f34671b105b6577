"""The client: exact columns, waiting for a server that restarts, no retries for a wrong request."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import httpx
import pytest

from agentloop.client.client import GenerateClient, version_number
from agentloop.client.time_limit import TimeLimit
from agentloop.errors import ConfigError, RequestRejected, ServerError
from agentloop.types import StopReason
from agentloop.wire import SESSION_HEADER, SamplingParams
from tests.virtual_time import run_virtually

Answer = tuple[int, Any]


@asynccontextmanager
async def server(answer: Callable[[int, dict[str, str], Any], Answer | None], port: int = 0) -> AsyncIterator[str]:
    """A real HTTP server of a few lines; `answer(n, headers, body)` gives status and body, None hangs up."""
    count = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        try:
            while line := await reader.readline():
                headers = {}
                while (line := await reader.readline()) != b"\r\n":
                    name, _, value = line.decode().partition(":")
                    headers[name.lower()] = value.strip()
                body = json.loads(await reader.readexactly(int(headers["content-length"])))
                count += 1
                reply = answer(count, headers, body)
                if reply is None:
                    return
                data = json.dumps(reply[1]).encode()
                extra = "retry-after: 0.01\r\n" if reply[0] == 503 else ""
                writer.write(f"HTTP/1.1 {reply[0]} X\r\ncontent-length: {len(data)}\r\n{extra}\r\n".encode() + data)
                await writer.drain()
        except asyncio.CancelledError:
            pass  # the test is over
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", port)
    async with listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def mock_sleep() -> Iterator[list[float]]:
    """Record pauses instead of making them."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agentloop.client.client.asyncio.sleep", sleep)
        yield slept


def good(**meta: Any) -> Answer:
    return 200, {
        "output_ids": [7, 8],
        "meta_info": {
            "id": "r",
            "finish_reason": {"type": "stop", "matched": 8},
            "prompt_tokens": 2,
            "completion_tokens": 2,
            "weight_version": "3",
            "output_token_logprobs": [[-0.5, 7, None], [-0.25, 8, None]],
            **meta,
        },
    }


async def ask(url: str, **options: Any) -> Any:
    async with GenerateClient(url, **{"retries": 3, "outage_s": 0.0, **options}) as client:
        return await client.generate([1, 2], SamplingParams(max_new_tokens=4), session_id="s", rid="r")


async def test_ids_logprobs_and_version_spans_come_back_exactly() -> None:
    seen: list[Any] = []

    def answer(_: int, headers: dict[str, str], body: Any) -> Answer:
        seen.append((headers, body))
        spans = [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}]
        return good(weight_versions=spans, cached_tokens=1, weight_version="4")

    async with server(answer) as url:
        result = await ask(url, token="secret")
    assert (result.token_ids, result.logprobs, result.versions) == ([7, 8], [-0.5, -0.25], [3, 4])
    assert (result.stop_reason, result.cached_tokens) == (StopReason.STOP, 1)
    headers, body = seen[0]
    assert headers[SESSION_HEADER.lower()] == "s" and headers["authorization"] == "Bearer secret"
    assert body["input_ids"] == [1, 2] and body["return_logprob"] is True and "text" not in body


async def test_a_server_that_hangs_up_or_is_overloaded_is_asked_again() -> None:
    answers: list[Answer | None] = [None, (503, {"error": {"message": "queue full"}}), (500, {}), good()]
    async with server(lambda n, *_: answers[n - 1]) as url:
        assert (await ask(url, outage_s=30.0)).versions == [3, 3]


async def test_patience_ends() -> None:
    async with server(lambda *_: (500, {"error": {"message": "engine on fire"}})) as url:
        with pytest.raises(ServerError, match="2 times; last error: 500: engine on fire"):
            await ask(url, retries=1)


async def test_nobody_there_is_a_server_error() -> None:
    for options in ({"retries": 0, "outage_s": 60.0}, {"retries": 8, "outage_s": 0.0}):
        with pytest.raises(ServerError, match="ConnectError"):
            await ask("http://127.0.0.1:9", **options)


async def test_a_server_that_is_killed_and_started_again_costs_no_request() -> None:
    port = free_port()
    asking = [asyncio.create_task(ask(f"http://127.0.0.1:{port}", retries=1, outage_s=30.0)) for _ in range(8)]
    await asyncio.sleep(0.5)  # several attempts later than `retries` would allow
    assert not any(task.done() for task in asking)
    async with server(lambda *_: good(), port):
        assert [result.versions for result in await asyncio.gather(*asking)] == [[3, 3]] * 8


async def test_a_server_that_asks_to_wait_is_waited_for_without_counting() -> None:
    async with server(lambda n, *_: (503, {}) if n < 6 else good()) as url:
        assert (await ask(url, retries=1, outage_s=30.0)).versions == [3, 3]
        with pytest.raises(ServerError, match="has been unavailable for"):
            await ask("http://127.0.0.1:9", retries=1, outage_s=0.1)


async def test_each_attempt_has_its_own_request_id() -> None:
    seen: list[str] = []

    def answer(n: int, _: Any, body: Any) -> Answer:
        seen.append(body["rid"])
        return (500, {}) if n < 3 else good()

    async with server(answer) as url:
        await ask(url)
    assert seen == ["r", "r.1", "r.2"]


@pytest.mark.parametrize("value", ["Wed, 21 Oct 2026 07:28:00 GMT", "-1", "nan", "1e9"])
async def test_a_retry_after_that_is_not_a_number_of_seconds_is_ignored(value: str) -> None:
    answers = iter([httpx.Response(429, headers={"retry-after": value}), httpx.Response(200, json=good()[1])])
    transport = httpx.MockTransport(lambda _: next(answers))
    with mock_sleep() as slept:
        await ask("http://server", transport=transport, outage_s=60.0)
    assert 0 < slept[0] <= 10.0


@pytest.mark.parametrize("url", ["localhost:30000", "ftp://server", "", "http://"])
def test_an_address_that_is_none_is_named(url: str) -> None:
    with pytest.raises(ConfigError, match="not the address of a rollout server"):
        GenerateClient(url)


async def test_a_refused_request_is_not_sent_again() -> None:
    calls: list[int] = []

    def answer(n: int, *_: Any) -> Answer:
        calls.append(n)
        return 400, {"error": {"message": "id 9 is outside the vocabulary", "field": "input_ids"}}

    async with server(answer) as url:
        with pytest.raises(RequestRejected, match="outside the vocabulary"):
            await ask(url)
    assert calls == [1]


@pytest.mark.parametrize(
    ("meta", "says"),
    [
        ({"output_token_logprobs": None}, "not as many logprobs"),
        ({"output_token_logprobs": [[-0.5, 7, None]]}, "not as many logprobs"),
        ({"output_token_logprobs": [[-0.5, 9, None], [-0.25, 8, None]]}, "logprob of token 9 for token 7"),
        ({"weight_versions": [{"version": "1", "start": 0, "end": 5}]}, "the version span 0 to 5 is outside"),
        ({"weight_versions": [{"version": "1", "start": 2, "end": 1}]}, "the version span"),
        ({"weight_version": "v3"}, "weight_version is 'v3', which is not a policy version"),
        ({"finish_reason": {"type": "bored"}}, "does not follow the /generate protocol: meta_info.finish_reason.type"),
    ],
)
async def test_an_answer_that_cannot_be_trusted_is_an_error(meta: dict[str, Any], says: str) -> None:
    async with server(lambda *_: good(**meta)) as url:
        with pytest.raises(ServerError, match=says):
            await ask(url)


async def test_a_plain_text_error_is_shown() -> None:
    async with server(lambda *_: (404, "nothing here")) as url:
        with pytest.raises(RequestRejected, match="nothing here"):
            await ask(url)


def test_versions_are_numbers() -> None:
    assert [version_number(v) for v in ("0", "17", "default")] == [0, 17, 0]
    with pytest.raises(ServerError, match="not a policy version"):
        version_number("step-17")


@pytest.mark.parametrize("token", ["two\nlines", "line\n", "ünïcode", "two words"])
async def test_a_token_that_cannot_be_sent_is_refused_without_showing_it(token: str) -> None:
    with pytest.raises(ConfigError, match="cannot be sent in an HTTP header") as error:
        GenerateClient("http://server", token=token)
    assert token not in str(error.value) and error.value.hint


async def test_names_that_no_header_can_hold_are_replaced_by_their_digest() -> None:
    seen: list[tuple[str, str]] = []

    def answer(n: int, headers: dict[str, str], body: Any) -> Answer:
        seen.append((headers[SESSION_HEADER.lower()], body["rid"]))
        return good()

    async with server(answer) as url, GenerateClient(url) as client:
        for name in ("plain/1", "zürich\n/1", "long" * 200):
            await client.generate([1], SamplingParams(), session_id=name, rid=name)
    assert seen[0] == ("plain/1", "plain/1")
    assert all(a == b and len(a) == 64 and a.isalnum() for a, b in seen[1:]) and seen[1] != seen[2]


@pytest.mark.parametrize("length", ["abc", "4096", [], {}, 0, -5, True, 1.5, float("inf"), float("nan")])
async def test_an_odd_context_length_is_an_error(length: Any) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, content=json.dumps({"context_length": length})))
    with pytest.raises(ServerError, match="which is not a positive whole number"):
        await GenerateClient("http://server", transport=transport).context_length()


@pytest.mark.parametrize(
    ("facts", "length"), [({}, None), ({"context_length": None}, None), ({"context_length": 7}, 7)]
)
async def test_the_context_length_is_optional(facts: Any, length: int | None) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=facts))
    assert await GenerateClient("http://server", transport=transport).context_length() == length


async def test_a_server_that_stays_away_is_waited_for_once_and_not_by_each_wave_of_requests() -> None:
    state = {"attempts": 0, "up": False, "now": 0.0}

    def reply(_: httpx.Request) -> httpx.Response:
        state["attempts"] += 1
        if not state["up"]:
            raise httpx.ConnectError("refused")
        return httpx.Response(200, json=good()[1])

    async def sleep(seconds: float) -> None:
        state["now"] += seconds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agentloop.client.client.asyncio.sleep", sleep)
        patch.setattr("agentloop.client.retry.time.monotonic", lambda: state["now"])
        transport = httpx.MockTransport(reply)
        async with GenerateClient("http://server", transport=transport, retries=3, outage_s=20.0) as client:

            async def attempts() -> int:
                before = state["attempts"]
                with suppress(ServerError):
                    await client.generate([1], SamplingParams(max_new_tokens=4), session_id="s", rid="r")
                return int(state["attempts"] - before)

            assert await attempts() > 10, "the first request waits for the whole outage"
            assert [await attempts() for _ in range(3)] == [1, 1, 1], "later ones ask once"
            state["up"] = True
            assert await attempts() == 1
            state["up"] = False
            assert await attempts() > 10, "another outage is waited for again"
            state["now"] += 60
            assert await attempts() > 10, "and so is one after a pause without requests"


async def test_a_server_that_expands_images_itself_is_found_out() -> None:
    """A bare SGLang answers expanded placeholders with tokens of another prompt, and a 200."""
    async with server(lambda *_: good()) as url, GenerateClient(url, retries=0) as client:
        seen = {"session_id": "s", "rid": "r", "image_data": ["aaaa"]}
        assert (await client.generate([1, 2], SamplingParams(), **seen)).token_ids == [7, 8]
        with pytest.raises(RequestRejected, match=r"2 prompt tokens instead of 5(?s:.*)--replica-url"):
            await client.generate([1, 9, 9, 9, 2], SamplingParams(), **seen)


def test_an_episodes_time_limit_does_not_count_an_outage() -> None:
    """An episode that ended by its time limit would be scored."""

    async def main() -> float:
        clock = asyncio.get_running_loop().time

        def reply(_: httpx.Request) -> httpx.Response:
            if clock() < 60:
                raise httpx.ConnectError("refused")
            return httpx.Response(200, json=good()[1])

        transport = httpx.MockTransport(reply)
        async with GenerateClient("http://server", transport=transport, outage_s=1e9) as client, TimeLimit(5.0):
            await client.generate([1], SamplingParams(max_new_tokens=4), session_id="s", rid="r")
        return clock()

    assert 60 <= run_virtually(main()) < 63
