"""The client of the rollout server: one call, tokens in; tokens, logprobs and versions out."""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import httpx
import orjson

from agentloop.errors import RequestRejected, ServerError
from agentloop.types import StopReason
from agentloop.wire import SESSION_HEADER, GenerateResponse, SamplingParams

RETRY_STATUS = frozenset({429, 500, 502, 503, 504})
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 8.0


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
        self, input_ids: Sequence[int], sampling: SamplingParams, *, session_id: str, rid: str
    ) -> GenerateResult: ...


class LaneTransport(httpx.AsyncBaseTransport):
    """Many connections, each in a pool of its own.

    httpx's own pool looks at every connection for every request: at 100 in flight that is 7 ms of CPU a request
    (measured), which is most of what an agent loop costs. Here a request takes the lane that was freed last.
    """

    def __init__(self, max_connections: int) -> None:
        self._free: list[httpx.AsyncHTTPTransport] = []
        self._lanes: list[httpx.AsyncHTTPTransport] = []
        self._slots = asyncio.Semaphore(max_connections)
        self._context = ssl.create_default_context()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        async with self._slots:
            lane = self._free.pop() if self._free else self._open()
            try:
                response = await lane.handle_async_request(request)
                # Read here, while the lane is ours: answers are small and always read whole.
                content = await response.aread()
            finally:
                self._free.append(lane)
        return httpx.Response(response.status_code, headers=response.headers, content=content, request=request)

    def _open(self) -> httpx.AsyncHTTPTransport:
        limits = httpx.Limits(max_connections=1, max_keepalive_connections=1)
        lane = httpx.AsyncHTTPTransport(verify=self._context, limits=limits, trust_env=False)
        self._lanes.append(lane)
        return lane

    async def aclose(self) -> None:
        await asyncio.gather(*(lane.aclose() for lane in self._lanes))


class GenerateClient:
    """Talks to a rollout server, or to a bare SGLang, over HTTP.

    A server that is gone or overloaded is asked again, with growing pauses: one that is killed and started again within
    about half a minute costs no request.

    Args:
        base_url: for instance `http://127.0.0.1:30000`.
        token: bearer token.
        timeout_s: of one attempt, waiting in the server's queue included.
        retries: further attempts after a failure that is the server's.
        max_connections: requests in flight at most.
    """

    def __init__(
        self,
        base_url: str,
        *,
        token: str | None = None,
        timeout_s: float = 600.0,
        retries: int = 8,
        max_connections: int = 256,
    ) -> None:
        self._retries = retries
        headers = {"content-type": "application/json"} | (
            {"authorization": f"Bearer {token}"} if token else {}
        )
        self._http = httpx.AsyncClient(
            base_url=base_url,
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=10.0),
            transport=LaneTransport(max_connections),
            trust_env=False,  # a proxy has no business between agents and their server
        )

    async def generate(
        self, input_ids: Sequence[int], sampling: SamplingParams, *, session_id: str, rid: str
    ) -> GenerateResult:
        """Sample one turn.

        Raises:
            ServerError: the server failed more often than `retries` allows.
            RequestRejected: it refused the request (4xx); the message is the server's.
        """
        body = orjson.dumps(
            {
                "input_ids": input_ids,
                "sampling_params": sampling.model_dump(exclude_none=True),
                "return_logprob": True,
                "rid": rid,
            }
        )
        pause = FIRST_PAUSE_S
        for attempt in range(self._retries + 1):
            try:
                answer = await self._http.post(
                    "/generate", content=body, headers={SESSION_HEADER: session_id}
                )
                if answer.status_code == 200:
                    return _read(answer.content)
                if answer.status_code not in RETRY_STATUS:
                    raise RequestRejected(
                        f"the server refused a generation ({answer.status_code}): {_message(answer)}"
                    )
                failure = f"{answer.status_code}: {_message(answer)}"
                wait = float(answer.headers.get("retry-after") or pause)
            except httpx.TransportError as exc:
                failure, wait = f"{type(exc).__name__}: {exc}", pause
            if attempt < self._retries:
                await asyncio.sleep(wait * (0.75 + 0.5 * random.random()))
                pause = min(LONGEST_PAUSE_S, 2 * pause)
        raise ServerError(
            f"a generation failed {self._retries + 1} times, last with {failure}",
            "see logs/server.log; rollout.retries sets how often it is tried",
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _read(content: bytes) -> GenerateResult:
    response = GenerateResponse.model_validate_json(content)
    meta = response.meta_info
    ids = response.output_ids
    if meta.output_token_logprobs is None or len(meta.output_token_logprobs) != len(ids):
        raise ServerError(
            f"the answer has {len(ids)} ids and no logprob for each", "the server has to return logprobs"
        )
    logprobs = []
    for token, (logprob, logged, _) in zip(ids, meta.output_token_logprobs, strict=True):
        if token != logged:
            raise ServerError(f"the answer gives a logprob of token {logged} for token {token}")
        logprobs.append(logprob)
    versions = [version_number(meta.weight_version)] * len(ids)
    for span in meta.weight_versions or ():
        versions[span.start : span.end] = [version_number(span.version)] * (span.end - span.start)
    if len(versions) != len(ids):
        raise ServerError(f"the version spans reach beyond the {len(ids)} sampled tokens")
    return GenerateResult(ids, logprobs, versions, StopReason(meta.finish_reason.type), meta.cached_tokens)


def version_number(version: str) -> int:
    """The policy version in a server's version string; a server that was never updated calls its own `default`: 0."""
    return int(version) if version.isdigit() else 0


def _message(answer: httpx.Response) -> str:
    try:
        error = answer.json()["error"]
        return str(error.get("message", error)) if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        return answer.text[:300]
