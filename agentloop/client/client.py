"""`GenerateClient`: tokens in; tokens, logprobs and policy versions out, in one call."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import httpx
import numpy as np
import orjson
from pydantic import ValidationError

from agentloop.client.connections import ConnectionPool
from agentloop.client.retry import LONGEST_PAUSE_S, Outage, Retries, retry_after
from agentloop.client.sent_images import SentImages
from agentloop.client.time_limit import not_counted
from agentloop.errors import ConfigError, RequestRejected, ServerError
from agentloop.types import StopReason
from agentloop.wire import (
    MAX_NAME_LENGTH,
    SESSION_HEADER,
    UNKNOWN_IMAGE,
    GenerateResponse,
    SamplingParams,
    bearer,
)

INFO_TIMEOUT_S = 30.0
"""Time limit of /server_info, which a server answers immediately, unlike a generation."""

RETRY_STATUS = frozenset({408, 429, 500, 502, 503, 504})
"""Statuses after which a request is sent again; any other means that the request is wrong."""


@dataclass(slots=True)
class GenerateResult:
    """One generation. `token_ids`, `logprobs` and `versions` have the same length."""

    token_ids: list[int]
    logprobs: list[float]
    versions: list[int]
    stop_reason: StopReason
    cached_tokens: int = 0


class Generator(Protocol):
    """The only interface between an episode and a policy."""

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
    """A client for a rollout server, or a plain SGLang server, over HTTP.

    Failed requests are sent again, with growing pauses. While the server is unreachable or
    overloaded, the client waits: if the server is killed and restarted within `outage_s`, no
    request is lost.

    Args:
        base_url: for instance `http://127.0.0.1:30000`.
        token: bearer token.
        timeout_s: time limit of one attempt, including the wait in the server's queue.
        retries: further attempts after a failure on the server's side; 0 disables retries.
        outage_s: how long to wait for an unreachable server, all requests together; these attempts
            are not counted.
        max_connections: largest number of requests in flight.
        context_headers: returns further headers of a generation; called in the task that asks for
            it, for example `agentloop.trace.trace_headers`.
        transport: replaces the connection pool; in tests, for instance `httpx.ASGITransport` or
            `httpx.MockTransport`.

    Raises:
        ConfigError: `base_url` is not an HTTP address, or no HTTP header can hold `token`.
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
        context_headers: Callable[[], Mapping[str, str]] = dict,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._url = httpx.URL(base_url.rstrip("/") + "/generate")
        if self._url.scheme not in ("http", "https") or not self._url.host:
            raise ConfigError(f"{base_url!r} is not the address of a rollout server", "write it as http://host:port")
        self._headers = [("content-type", "application/json"), ("accept", "application/json")]
        if token:
            self._headers.append(("authorization", bearer(token)))
        self._timeouts = {"timeout": httpx.Timeout(timeout_s, connect=10.0).as_dict()}
        self._context_headers = context_headers
        self._retries = retries
        self._outage_s = outage_s
        self._outage = Outage()
        self._transport = transport or ConnectionPool(max_connections)
        self._sent_images: SentImages | None = None

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
            rid: id of the request, by which it can be aborted.
            image_data: the prompt's images in order, base64-encoded.

        Raises:
            ServerError: the server failed more often than `retries` allows, was unavailable for
                longer than `outage_s`, or its answer breaks the token law.
            RequestRejected: the server refused the request (4xx); the message is the server's. Or
                it read the images as another number of tokens.
        """
        request = {
            "input_ids": input_ids,
            "sampling_params": sampling.model_dump(mode="json", exclude_none=True),
            "return_logprob": True,
        }
        sent_images = self._sent_images
        if image_data:
            request["image_data"] = list(image_data) if sent_images is None else sent_images.named(image_data)

        retries = Retries(self._retries, self._outage_s, self._outage)
        for attempt in itertools.count():
            # The server may still be working on an attempt that timed out, so each has its own id.
            body = orjson.dumps(
                {**request, "rid": _name(f"{rid}.{attempt}" if attempt else rid)},
                default=np.asarray,  # a column of token ids, which is not a list
                option=orjson.OPT_SERIALIZE_NUMPY,
            )
            try:
                answer = await self._post(body, session_id)
            except (httpx.ConnectError, httpx.ConnectTimeout) as exc:
                pause = retries.after_outage(f"{type(exc).__name__}: {exc}")
            except httpx.TransportError as exc:
                pause = retries.after_failure(f"{type(exc).__name__}: {exc}")
            else:
                self._outage.over()
                if answer.status_code == 200:
                    if image_data and sent_images is not None:
                        sent_images.sent(image_data)
                    return _read(answer.content, len(input_ids) if image_data else None)

                whole = list(image_data)
                if sent_images is not None and _error_type(answer) == UNKNOWN_IMAGE and request["image_data"] != whole:
                    sent_images.forget()
                    request["image_data"] = whole
                    continue
                failure = f"{answer.status_code}: {_message(answer)}"
                if answer.status_code not in RETRY_STATUS:
                    raise RequestRejected(f"the server refused a generation, {failure}")

                # A server that answers with Retry-After is overloaded, not broken.
                wanted = retry_after(answer.headers, LONGEST_PAUSE_S)
                pause = retries.after_failure(failure) if wanted is None else retries.after_outage(failure, wanted)

            with not_counted():  # neither the policy nor the task made the server restart
                await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    async def context_length(self) -> int | None:
        """Return the longest sequence that the server accepts; None if it does not report one.

        Also notes whether the server keeps images; from then on each is sent to it once.

        Raises:
            ServerError: the server cannot be reached, or its answer is not a server's.
        """
        url = self._url.join("server_info")
        timeout = {"timeout": httpx.Timeout(INFO_TIMEOUT_S, connect=10.0).as_dict()}
        request = httpx.Request("GET", url, headers=self._headers, extensions=timeout)
        try:
            answer = await self._transport.handle_async_request(request)
            await answer.aread()
        except httpx.TransportError as exc:
            raise ServerError(
                f"{url} cannot be reached: {exc or type(exc).__name__}", "start the server, or correct its URL"
            ) from exc
        if answer.status_code != 200:
            raise ServerError(f"{url} answered {answer.status_code}: {_message(answer)}")
        try:
            facts = answer.json()
            length = facts.get("context_length")
        except (ValueError, AttributeError) as exc:
            raise ServerError(f"{url} did not answer with a JSON object", "check the URL") from exc
        self._sent_images = SentImages() if facts.get("keeps_images") is True else None
        if length is None:
            return None
        if isinstance(length, bool) or not isinstance(length, int) or length < 1:
            raise ServerError(
                f"{url} reports the context_length {repr(length)[:80]}, which is not a positive whole number",
                "check that the URL is a rollout server's",
            )
        return length

    async def close(self) -> None:
        await self._transport.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _post(self, body: bytes, session_id: str) -> httpx.Response:
        # The transport is used without httpx.AsyncClient: its cookies, redirects and authentication
        # flows are half of httpx's cost.
        headers = [*self._headers, (SESSION_HEADER, _name(session_id)), *self._context_headers().items()]
        request = httpx.Request("POST", self._url, headers=headers, content=body, extensions=self._timeouts)
        answer = await self._transport.handle_async_request(request)
        await answer.aread()
        return answer


def _read(content: bytes, prompt_tokens: int | None) -> GenerateResult:
    """Read an answer and check the token law: each sampled token has an id, a logprob and a
    version.

    Args:
        prompt_tokens: length of a prompt with images; None: of a prompt without.

    Raises:
        ServerError: the answer is malformed, or lacks one of them.
        RequestRejected: the prompt was read as another number of tokens.
    """
    try:
        response = GenerateResponse.model_validate_json(content)
    except ValidationError as exc:
        fault = exc.errors()[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise ServerError(f"the answer does not follow the /generate protocol: {place}: {fault['msg']}") from exc

    meta = response.meta_info
    ids = response.output_ids
    if prompt_tokens not in (None, meta.prompt_tokens) and meta.finish_reason.type != "abort":
        raise RequestRejected(
            f"the server read {meta.prompt_tokens} prompt tokens instead of {prompt_tokens}: a bare SGLang expands "
            "images itself",
            "send requests with images to a rollout server before it: agentloop serve --replica-url URL",
        )
    if meta.output_token_logprobs is None or len(meta.output_token_logprobs) != len(ids):
        raise ServerError(f"the answer has {len(ids)} ids, but not as many logprobs", "the server must return logprobs")

    logprobs = []
    for token, (logprob, logged, _) in zip(ids, meta.output_token_logprobs, strict=True):
        if token != logged:
            raise ServerError(f"the answer gives the logprob of token {logged} for token {token}")
        logprobs.append(logprob)

    versions = [version_number(meta.weight_version)] * len(ids)
    for span in meta.weight_versions or ():
        if not 0 <= span.start <= span.end <= len(ids):
            raise ServerError(f"the version span {span.start} to {span.end} is outside the {len(ids)} sampled tokens")
        versions[span.start : span.end] = [version_number(span.version)] * (span.end - span.start)

    return GenerateResult(ids, logprobs, versions, StopReason(meta.finish_reason.type), meta.cached_tokens)


def version_number(version: str) -> int:
    """Return the policy version in a server's version string.

    A server that was never updated reports `default`, which is version 0.

    Raises:
        ServerError: the string is not a version. Guessing one would hide how stale a token is.
    """
    if version == "default":
        return 0
    if not version.isdecimal():
        raise ServerError(
            f"the server's weight_version is {version!r}, which is not a policy version",
            "start the server without --weight-version, or give it a number",
        )
    return int(version)


def _name(text: str) -> str:
    """Return `text` as the name of a request or a session; its digest where a header cannot hold
    it, for example because a row's id is in it."""
    if len(text) <= MAX_NAME_LENGTH and text.isascii() and text.isprintable():
        return text
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _error_type(answer: httpx.Response) -> str | None:
    """Return the type of the server's error; None if it has none."""
    try:
        kind = answer.json()["error"]["type"]
    except (ValueError, KeyError, TypeError):
        return None
    return kind if isinstance(kind, str) else None


def _message(answer: httpx.Response) -> str:
    """Return the server's error text."""
    try:
        error = answer.json()["error"]
        return str(error.get("message", error)) if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        return answer.text[:300]
