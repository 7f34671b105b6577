"""The client of the rollout server: one call, tokens in; tokens, logprobs and versions out."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import httpx
import orjson
from pydantic import ValidationError

from agentloop.client.connections import ConnectionPool
from agentloop.errors import ConfigError, RequestRejected, ServerError
from agentloop.types import StopReason
from agentloop.wire import SESSION_HEADER, GenerateResponse, SamplingParams

RETRY_STATUS = frozenset({429, 500, 502, 503, 504})
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 8.0
LONGEST_POLL_S = 1.0
"""Between two looks for a server that is gone: it is to be found soon after it is back."""


@dataclass(slots=True)
class GenerateResult:
    """One generation. `token_ids`, `logprobs` and `versions` have one length."""

    token_ids: list[int]
    logprobs: list[float]
    versions: list[int]
    stop_reason: StopReason
    cached_tokens: int = 0


class Generator(Protocol):
    """All that an episode needs of a policy."""

    async def generate(
        self,
        input_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        session_id: str,
        rid: str,
        image_data: Sequence[str] = (),
    ) -> GenerateResult: ...


class GenerateClient:
    """Talks to a rollout server, or to a bare SGLang, over HTTP.

    A server that fails is asked again, with growing pauses. One that is gone, or that asks to wait, is waited for:
    killed and started again within `outage_s`, it costs no request.

    Args:
        base_url: for instance `http://127.0.0.1:30000`.
        token: bearer token.
        timeout_s: of one attempt, waiting in the server's queue included.
        retries: further attempts after a failure that is the server's; 0: none at all.
        outage_s: how long a server that takes no connection is waited for, without counting attempts.
        max_connections: requests in flight at most.
        transport: how requests travel; for tests, for instance `httpx.ASGITransport` or `httpx.MockTransport`.

    Raises:
        ConfigError: `base_url` is no HTTP address.
    """

    def __init__(
        self,
        base_url: str,
        *,
        token: str | None = None,
        timeout_s: float = 600.0,
        retries: int = 8,
        outage_s: float = 120.0,
        max_connections: int = 256,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._url = httpx.URL(base_url.rstrip("/") + "/generate")
        if self._url.scheme not in ("http", "https") or not self._url.host:
            raise ConfigError(f"{base_url!r} is no address of a rollout server", "write http://host:port")
        self._headers = [("content-type", "application/json"), ("accept", "application/json")]
        if token:
            self._headers.append(("authorization", f"Bearer {token}"))
        self._timeouts = {"timeout": httpx.Timeout(timeout_s, connect=10.0).as_dict()}
        self._retries = retries
        self._outage_s = outage_s
        self._transport = transport or ConnectionPool(max_connections)

    async def generate(
        self,
        input_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        session_id: str,
        rid: str,
        image_data: Sequence[str] = (),
    ) -> GenerateResult:
        """Sample one turn.

        Args:
            input_ids: the whole prompt.
            session_id: generations of one session go to one replica, where their prefix is cached.
            rid: id of the request; it can be aborted by it.
            image_data: the prompt's images in their order, in base64.

        Raises:
            ServerError: the server failed more often than `retries` allows, was gone for longer than `outage_s`, or
                gave an answer that cannot be trusted.
            RequestRejected: it refused the request (4xx); the message is the server's.
        """
        request = {
            "input_ids": input_ids,
            "sampling_params": sampling.model_dump(mode="json", exclude_none=True),
            "return_logprob": True,
        }
        if image_data:
            request["image_data"] = list(image_data)
        patience = _Patience(self._retries, self._outage_s)
        for attempt in itertools.count():
            # A server may still work on an attempt that timed out: the next one has a name of its own.
            body = orjson.dumps({**request, "rid": f"{rid}.{attempt}" if attempt else rid})
            try:
                answer = await self._post(body, session_id)
            except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
                pause = patience.after_outage(f"{type(exc).__name__}: {exc}")
            except httpx.TransportError as exc:
                pause = patience.after_failure(f"{type(exc).__name__}: {exc}")
            else:
                if answer.status_code == 200:
                    return _read(answer.content)
                failure = f"{answer.status_code}: {_message(answer)}"
                wanted = _retry_after(answer)
                if answer.status_code not in RETRY_STATUS:
                    raise RequestRejected(f"the server refused a generation, {failure}")
                pause = patience.after_failure(failure) if wanted is None else patience.after_outage(failure, wanted)
            await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    async def close(self) -> None:
        await self._transport.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _post(self, body: bytes, session_id: str) -> httpx.Response:
        # No AsyncClient around the transport: cookies, redirects and authentication flows are half of httpx's cost.
        headers = [*self._headers, (SESSION_HEADER, session_id)]
        request = httpx.Request("POST", self._url, headers=headers, content=body, extensions=self._timeouts)
        answer = await self._transport.handle_async_request(request)
        await answer.aread()
        return answer


class _Patience:
    """How long to wait before a request is sent again, and when to give up."""

    def __init__(self, retries: int, outage_s: float) -> None:
        self._retries = retries
        self._outage_s = outage_s
        self._failures = 0
        self._pause = FIRST_PAUSE_S
        self._gone_since: float | None = None

    def after_failure(self, failure: str) -> float:
        """Seconds to wait after an attempt that failed.

        Raises:
            ServerError: there have been too many.
        """
        self._gone_since = None
        self._failures += 1
        if self._failures > self._retries:
            raise ServerError(
                f"a generation failed {self._failures} times, last with {failure}",
                "see logs/server.log; rollout.retries sets how often it is tried",
            )
        return self._next(LONGEST_PAUSE_S)

    def after_outage(self, failure: str, wanted: float | None = None) -> float:
        """Seconds to wait for a server that takes no connection, or that asked for `wanted` seconds.

        Raises:
            ServerError: it has been so for too long.
        """
        now = time.monotonic()
        if self._gone_since is None:
            self._gone_since = now
        if not self._retries or now - self._gone_since >= self._outage_s:
            raise ServerError(
                f"the rollout server did not serve for {now - self._gone_since:.0f} s: {failure}",
                "see logs/server.log",
            )
        if wanted is None:
            return self._next(LONGEST_POLL_S)
        return max(wanted, FIRST_PAUSE_S) * random.uniform(1.0, 1.25)

    def _next(self, longest: float) -> float:
        # Jitter: the requests of a batch fail together and are not to come back together.
        pause = min(self._pause, longest) * random.uniform(0.75, 1.25)
        self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
        return pause


def _read(content: bytes) -> GenerateResult:
    """Check an answer against the token law: an id, its logprob and its policy version for each sampled token."""
    try:
        response = GenerateResponse.model_validate_json(content)
    except ValidationError as exc:
        fault = exc.errors()[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise ServerError(f"the answer is not one of a rollout server: {place}: {fault['msg']}") from exc
    meta = response.meta_info
    ids = response.output_ids
    if meta.output_token_logprobs is None or len(meta.output_token_logprobs) != len(ids):
        raise ServerError(f"the answer has {len(ids)} ids and no logprob for each", "the server has to return logprobs")
    logprobs = []
    for token, (logprob, logged, _) in zip(ids, meta.output_token_logprobs, strict=True):
        if token != logged:
            raise ServerError(f"the answer gives a logprob of token {logged} for token {token}")
        logprobs.append(logprob)
    versions = [version_number(meta.weight_version)] * len(ids)
    for span in meta.weight_versions or ():
        if not 0 <= span.start <= span.end <= len(ids):
            raise ServerError(f"a version span, {span.start} to {span.end}, is outside the {len(ids)} sampled tokens")
        versions[span.start : span.end] = [version_number(span.version)] * (span.end - span.start)
    return GenerateResult(ids, logprobs, versions, StopReason(meta.finish_reason.type), meta.cached_tokens)


def version_number(version: str) -> int:
    """The policy version in a server's version string; a server that was never updated calls its own `default`: 0.

    Raises:
        ServerError: it is neither; a version that is guessed would hide how stale a token is.
    """
    if version == "default":
        return 0
    if not version.isdecimal():
        raise ServerError(
            f"the server's weight_version is {version!r}, which is no policy version",
            "start the server without --weight-version, or with a number",
        )
    return int(version)


def _retry_after(answer: httpx.Response) -> float | None:
    """The seconds that an overloaded server asks for; None when it names none."""
    try:
        seconds = float(answer.headers["retry-after"])
    except (KeyError, ValueError):  # it may also be a date
        return None
    return min(seconds, LONGEST_PAUSE_S) if seconds >= 0 else None


def _message(answer: httpx.Response) -> str:
    try:
        error = answer.json()["error"]
        return str(error.get("message", error)) if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        return answer.text[:300]
