"""The client of a service: what it retries, how long it waits, what its errors say; on a virtual clock."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import httpx
import pytest

from agentloop.client.connections import AnswerTooLarge
from agentloop.client.time_limit import TimeLimit
from agentloop.errors import RequestRejected, ToolConfigError, ToolError, ToolUnavailable
from tests.virtual_time import run_virtually
from tools.http import RateLimit, ServiceClient

Answer = httpx.Response | Exception
URL = "http://127.0.0.1:8000/retrieve"


def ask(answers: list[Answer] | Callable[[], Answer], **options: Any) -> tuple[Any, list[float], list[httpx.Request]]:
    """Return a call's result, or its exception, and when each attempt arrived, and the attempts."""
    times: list[float] = []
    requests: list[httpx.Request] = []

    async def main() -> Any:
        clock = asyncio.get_running_loop().time

        def handle(request: httpx.Request) -> httpx.Response:
            times.append(clock())
            requests.append(request)
            answer = answers() if callable(answers) else answers[min(len(times), len(answers)) - 1]
            if isinstance(answer, Exception):
                raise answer
            return answer

        client = ServiceClient(
            "search", URL, RateLimit(None, 8), transport=httpx.MockTransport(handle), clock=clock, **options
        )
        try:
            return await client.post({"queries": ["a"]}, "episode")
        except (ToolError, RequestRejected) as exc:
            return exc

    return run_virtually(main()), times, requests


def ok() -> httpx.Response:
    return httpx.Response(200, json={"result": []})


@pytest.mark.parametrize(
    "failure",
    [
        httpx.Response(500),
        httpx.Response(503, text="starting"),
        httpx.Response(429),
        httpx.Response(408),
        httpx.Response(200, text="<html>"),
        httpx.ReadTimeout("no answer within 30 s"),
        httpx.ReadError("the connection was lost"),
        httpx.ConnectError("refused"),
    ],
)
def test_a_failed_request_is_sent_again(failure: Answer) -> None:
    result, times, _ = ask([failure, failure, ok()])
    assert result == {"result": []}
    assert len(times) == 3


def test_retries_are_bounded_and_their_pauses_grow_with_jitter() -> None:
    result, times, _ = ask([httpx.Response(500, json={"error": "index is broken"})], retries=4)
    assert isinstance(result, ToolError)
    assert result.final
    assert result.message == f"search at {URL} failed 5 times; last error: 500: index is broken"
    pauses = [after - before for before, after in itertools.pairwise(times)]
    assert all(0.75 <= pause / expected <= 1.25 for pause, expected in zip(pauses, (0.1, 0.2, 0.4, 0.8), strict=True))
    assert len({round(pause / expected, 6) for pause, expected in zip(pauses, (0.1, 0.2, 0.4, 0.8), strict=True)}) > 1


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured_and_counts_as_waiting(status: int) -> None:
    busy = httpx.Response(status, headers={"retry-after": "7"})
    result, times, _ = ask([busy] * 6 + [ok()], retries=2)
    assert result == {"result": []}
    assert all(7 <= after - before <= 7 * 1.25 for before, after in itertools.pairwise(times))


def test_retry_after_may_be_a_date() -> None:
    busy = httpx.Response(503, headers={"retry-after": formatdate(time.time() + 20, usegmt=True)})
    result, times, _ = ask([busy, ok()])
    assert result == {"result": []}
    assert 15 <= times[1] - times[0] <= 26


def test_a_dead_server_is_waited_for_and_then_named_with_the_last_error() -> None:
    result, times, _ = ask([httpx.ConnectError("connection refused")], outage_s=60)
    assert isinstance(result, ToolError)
    assert "search at http://127.0.0.1:8000/retrieve has been unavailable for 6" in result.message
    assert "ConnectError: connection refused" in result.message
    assert 60 <= times[-1] < 63


def test_a_server_that_returns_is_used_again() -> None:
    clock = iter(range(1000))
    result, times, _ = ask(lambda: ok() if next(clock) > 30 else httpx.ConnectError("refused"), outage_s=60)
    assert result == {"result": []}
    assert times[-1] > 20


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_the_service_calls_wrong_is_not_repeated(status: int) -> None:
    result, times, _ = ask([httpx.Response(status, json={"detail": "queries is empty"})])
    assert isinstance(result, RequestRejected)
    assert f"{status}: queries is empty" in str(result)
    assert len(times) == 1


@pytest.mark.parametrize(
    ("status", "fix"), [(401, "token"), (403, "token"), (404, "path"), (405, "path"), (302, "URL")]
)
def test_a_wrong_address_or_token_is_a_fault_of_the_set_up(status: int, fix: str) -> None:
    result, times, _ = ask([httpx.Response(status)])
    assert isinstance(result, ToolError)
    assert result.final
    assert URL in result.message and fix in (result.hint or "")
    assert len(times) == 1


def test_headers_and_token_are_sent_and_never_shown() -> None:
    answer = httpx.Response(500, text="wrong key abc-secret for token-secret")
    result, _, requests = ask([answer], headers={"x-key": "abc-secret"}, token="token-secret", retries=0)
    assert requests[0].headers["authorization"] == "Bearer token-secret"
    assert requests[0].headers["x-key"] == "abc-secret"
    assert isinstance(result, ToolError)
    assert "secret" not in str(result)


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host/x", "http://", "http://[::1/x", 5])
def test_a_wrong_url_is_named(url: Any) -> None:
    with pytest.raises(ToolConfigError, match=r"search: .* is not"):
        ServiceClient("search", url, RateLimit(None, 1))


def test_a_url_is_shown_without_credentials() -> None:
    client = ServiceClient("search", "http://me:pass@host:1/retrieve?key=abc", RateLimit(None, 1))
    assert client.shown_url == "http://host:1/retrieve"


@pytest.mark.parametrize("status", [502, 503])
def test_a_proxys_answer_for_a_service_that_is_away_is_an_outage(status: int) -> None:
    refusal = httpx.Response(status, text="upstream is down")
    result, times, _ = ask([refusal] * 40 + [ok()], retries=2, outage_s=60)
    assert result == {"result": []}
    assert all(after - before <= 1.25 for before, after in itertools.pairwise(times))
    result, times, _ = ask([refusal], retries=2, outage_s=60)
    assert isinstance(result, ToolUnavailable)
    assert f"{URL} has been unavailable for 6" in result.message
    assert f"last error: {status}: upstream is down" in result.message
    assert isinstance(ask([refusal], retries=0)[0], ToolUnavailable), "without retries, nothing is waited for"


def test_a_request_that_alone_meets_a_proxys_answer_is_given_up_too() -> None:
    """Others that are answered meanwhile do not begin its wait anew."""

    async def main() -> float:
        clock = asyncio.get_running_loop().time

        def handle(request: httpx.Request) -> httpx.Response:
            return httpx.Response(502) if b"poison" in request.content else ok()

        transport = httpx.MockTransport(handle)
        client = ServiceClient("search", URL, RateLimit(None, 8), transport=transport, clock=clock, outage_s=60)
        poison = asyncio.create_task(client.post("poison", 1))
        while not poison.done():
            assert await client.post("fine", 2) == {"result": []}
            await asyncio.sleep(0.3)
        with pytest.raises(ToolUnavailable):
            await poison
        return clock()

    assert 60 <= run_virtually(main()) < 63


def test_an_outage_is_said_once_at_its_begin_and_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    refused = httpx.ConnectError("connection refused")
    for answers in ([refused] * 9 + [ok()], [httpx.Response(503)] * 9 + [ok()]):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert ask(answers, outage_s=90)[0] == {"result": []}
        began, ended = [record.getMessage() for record in caplog.records]
        assert began.startswith(f"search at {URL} is away (") and began.endswith("its calls wait for it, 90 s at most")
        assert ended.startswith(f"search at {URL} answers again, after ")
    caplog.clear()
    ask([httpx.Response(500), httpx.Response(429, headers={"retry-after": "3"}), ok()])
    assert not caplog.records


@pytest.mark.parametrize("failure", [httpx.ConnectError("refused"), httpx.Response(500), httpx.Response(502)])
def test_an_episodes_time_limit_counts_only_the_attempt_that_was_answered(failure: Answer) -> None:
    async def main() -> float:
        clock = asyncio.get_running_loop().time
        answers = iter([failure] * 4)

        async def handle(_: httpx.Request) -> httpx.Response:
            answer = next(answers, None)
            await asyncio.sleep(20.0 if answer is not None else 0.7)  # attempts that fail are slow
            if isinstance(answer, Exception):
                raise answer
            return answer or ok()

        limit = RateLimit(None, 1)
        client = ServiceClient("search", URL, limit, transport=httpx.MockTransport(handle), clock=clock, retries=8)
        async with limit.slot("another"):
            waiting = asyncio.create_task(limited(client))
            await asyncio.sleep(50)
        return await waiting

    async def limited(client: ServiceClient) -> float:
        async with TimeLimit(1.0) as clock:
            await client.post({}, "episode")
            left = clock._timeout.when()
            assert left is not None
            return left - asyncio.get_running_loop().time()

    assert run_virtually(main()) == pytest.approx(0.3)


@pytest.mark.parametrize("charset", ["hex", "zlib", "idna", "rot13", "no-such-charset"])
def test_a_refusal_is_read_whatever_charset_it_names(charset: str) -> None:
    """Some of Python's codecs are not of text."""
    kind = {"content-type": f"text/plain; charset={charset}"}
    result, _, _ = ask([httpx.Response(400, content=b"no {", headers=kind)])
    assert (
        isinstance(result, RequestRejected) and result.message == "search: the service refused the request, 400: no {"
    )
    result, _, _ = ask([httpx.Response(400, content=b"[" * 200_000)])
    assert isinstance(result, RequestRejected)


def test_an_answer_that_is_too_large_is_not_asked_for_again() -> None:
    result, times, requests = ask([AnswerTooLarge("more"), ok()], headers={"Accept-Encoding": "identity"})
    assert isinstance(result, ToolError) and result.message == f"search at {URL}: the answer has more than 32 MB"
    assert len(times) == 1
    assert requests[0].extensions["most_bytes"] == 2**25
    assert requests[0].headers.get_list("accept-encoding") == ["identity"]
