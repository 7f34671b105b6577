"""`POST /generate`: the path of every token, kept short."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import orjson
from starlette.types import Receive, Scope, Send

from agentloop.config.server import ServerSettings
from agentloop.wire import MAX_NAME_LENGTH, SESSION_HEADER, TRACEPARENT_HEADER, GenerateRequest, SamplingParams
from rollout_server.api.asgi import read_body, send_error, send_json
from rollout_server.api.kept_images import KeptImages
from rollout_server.api.metrics import CLIENT_LEFT, Metrics
from rollout_server.api.parsing import parse_generate
from rollout_server.api.stream import EventStream, EventWriter, answer_fields, encode
from rollout_server.engines.base import Generation, GenerationResult
from rollout_server.errors import RequestError, ServingError, answer_to
from rollout_server.router.router import Router

DISCONNECT_CHECK_S = 0.25
"""Requests that take longer than this are watched for a disconnecting client; for shorter ones a
task costs too much."""

LARGE_BODY_BYTES = 2**20
"""Bodies over this size, images as a rule, are parsed in a thread: other requests go on meanwhile,
except while one list of token ids is read (`parsing.MAX_VALUES`)."""

ResultT = TypeVar("ResultT")

_SESSION_HEADER = SESSION_HEADER.lower().encode()
_ROUTING_HEADER = b"x-smg-routing-key"  # the same in SGLang's own router
_TRACEPARENT = TRACEPARENT_HEADER.encode()

_TRACE_CONTEXT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]{0,200})?\Z")
"""What is passed on of `traceparent`; anything else is ignored, as W3C Trace Context demands."""


class GenerateEndpoint:
    """The ASGI endpoint."""

    def __init__(self, router: Router, metrics: Metrics, settings: ServerSettings) -> None:
        self._router = router
        self._metrics = metrics
        self._incremental = settings.incremental_streaming_output
        self._clip = settings.clip_new_tokens
        self._images = KeptImages()
        self._parsing = asyncio.Semaphore(1)  # more at once would only share Python's lock, and memory
        self._numbers = itertools.count()
        self._prefix = f"{os.getpid():x}-{time.time_ns():x}-"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begin = time.perf_counter()
        events: EventWriter | None = None
        try:
            request = await self._read(scope, receive)
            requests = request if isinstance(request, list) else [request]
            generations = self._accept_all(request) if isinstance(request, list) else [self.accept(request)]
            headers = dict(scope["headers"])
            session = _session(headers) or requests[0].session_id
            if (traceparent := headers.get(_TRACEPARENT)) is not None and _TRACE_CONTEXT.match(traceparent):
                for generation in generations:
                    generation.traceparent = traceparent
            logprobs = [one.return_logprob for one in requests]

            if requests[0].stream:
                events = EventWriter(send)
                streams = [
                    EventStream(
                        events, generation, incremental=self._incremental, logprobs=logprobs[i],
                        index=i if isinstance(request, list) else None,
                    )
                    for i, generation in enumerate(generations)
                ]  # fmt: skip
                work = [stream.follow(self._generate(stream.generation, session)) for stream in streams]
            else:
                work = [self._generate(generation, session) for generation in generations]
            results = await self._unless_left(_all(work), receive)
        except ServingError as exc:
            answer = answer_to(exc)
            self._metrics.count_request(answer.status)
            if events is None or not events.started:
                await send_error(send, answer)
            else:  # the status has been sent
                await events.event(answer.body)
                await events.end()
            return

        if results is None:
            self._metrics.count_request(CLIENT_LEFT)
            return
        self._metrics.count_request(200, time.perf_counter() - begin)
        if events is not None:
            await events.end()
        elif isinstance(request, list):
            answers = [
                answer_fields(generation, result, return_logprob=wanted)
                for generation, result, wanted in zip(generations, results, logprobs, strict=True)
            ]
            await send_json(send, orjson.dumps(answers))
        else:
            await send_json(send, encode(generations[0], results[0], return_logprob=logprobs[0]))

    async def _read(self, scope: Scope, receive: Receive) -> GenerateRequest | list[GenerateRequest]:
        body = await read_body(scope, receive)
        if len(body) <= LARGE_BODY_BYTES:
            return self._parse(body)
        async with self._parsing:
            return await asyncio.to_thread(self._parse, body)

    def _parse(self, body: bytes) -> GenerateRequest | list[GenerateRequest]:
        parsed = parse_generate(body)
        if self._router.info.images:
            self._images.put_in_place(parsed if isinstance(parsed, list) else [parsed])
        return parsed

    def accept(self, request: GenerateRequest, checked: set[int] | None = None) -> Generation:
        """Check what depends on the model: vocabulary, context and images.

        Args:
            checked: `id()` of the lists of token ids that were found right; those of this request
                are added. The answers of a batch share such lists.

        Raises:
            RequestError: names the field.
        """
        info, ids, sampling = self._router.info, request.input_ids, request.sampling_params
        checked = set() if checked is None else checked
        if id(ids) not in checked and (max(ids) >= info.vocab_size or min(ids) < 0):
            place, wrong = next((i, t) for i, t in enumerate(ids) if not 0 <= t < info.vocab_size)
            raise RequestError(
                f"input_ids[{place}] is {wrong}, outside the vocabulary 0..{info.vocab_size - 1}", f"input_ids.{place}"
            )
        self._check_sampled_ids(sampling, checked)
        checked.update(map(id, (ids, sampling.stop_token_ids, sampling.logit_bias)))

        room = info.context_length - len(ids)
        if self._clip and 0 < room < sampling.max_new_tokens:
            minimum = min(sampling.min_new_tokens, room)
            sampling = sampling.model_copy(update={"max_new_tokens": room, "min_new_tokens": minimum})
        if sampling.max_new_tokens > room:
            raise RequestError(
                f"{len(ids)} prompt tokens and max_new_tokens {sampling.max_new_tokens} are more than "
                f"the context of {info.context_length}",
                "input_ids" if room <= 0 else "sampling_params.max_new_tokens",
            )

        rid = request.rid or self._prefix + str(next(self._numbers))
        images = [request.image_data] if isinstance(request.image_data, str) else request.image_data or []
        if images and not info.images:
            raise RequestError("the served model does not take images", "image_data")
        if info.placeholders is not None:
            info.placeholders.check(ids, len(images))
        return Generation(rid, ids, sampling, image_data=images)

    def _accept_all(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        generations = []
        checked: set[int] = set()
        for number, request in enumerate(requests):
            try:
                generations.append(self.accept(request, checked))
            except RequestError as exc:
                raise RequestError(f"answer {number} of the batch: {exc.message}", exc.field) from exc
        return generations

    def _check_sampled_ids(self, sampling: SamplingParams, checked: set[int]) -> None:
        vocab_size = self._router.info.vocab_size
        stop, bias = ([] if id(ids) in checked else ids or [] for ids in (sampling.stop_token_ids, sampling.logit_bias))
        for place, token in enumerate(stop):
            if not 0 <= token < vocab_size:
                raise RequestError(
                    f"stop_token_ids[{place}] is {token}, outside the vocabulary 0..{vocab_size - 1}",
                    f"sampling_params.stop_token_ids.{place}",
                )
        for token in bias:
            if not 0 <= token < vocab_size:
                raise RequestError(
                    f"logit_bias names token {token}, outside the vocabulary 0..{vocab_size - 1}",
                    f"sampling_params.logit_bias.{token}",
                )

    async def _generate(self, generation: Generation, session: str | None) -> GenerationResult:
        if not generation.sampling.max_new_tokens:
            version = self._router.weights.version
            return GenerationResult([], [], [], "length", None, cached_tokens=0, weight_version=version)
        return await self._router.generate(generation, session)

    async def _unless_left(self, work: Coroutine[Any, Any, ResultT], receive: Receive) -> ResultT | None:
        """Return the result of `work`, or None if the client left earlier."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        left = False
        watcher: asyncio.Task[None] | None = None

        async def watch() -> None:
            nonlocal left
            while (await receive())["type"] != "http.disconnect":
                pass
            left = True
            task.cancel()

        def start_watching() -> None:
            nonlocal watcher
            watcher = loop.create_task(watch())

        timer = loop.call_later(DISCONNECT_CHECK_S, start_watching)
        try:
            return await work
        except asyncio.CancelledError:
            if left:
                task.uncancel()
                return None
            raise
        finally:
            timer.cancel()
            if watcher is not None:
                watcher.cancel()


async def _all(work: Sequence[Coroutine[Any, Any, GenerationResult]]) -> list[GenerationResult]:
    """Return all results; end the rest when one fails, or when this task is cancelled."""
    if len(work) == 1:
        return [await work[0]]
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _session(headers: Mapping[bytes, bytes]) -> str | None:
    """Return the session that the headers name, or None.

    Raises:
        RequestError: its name is too long, or has control characters.
    """
    raw = headers.get(_SESSION_HEADER) or headers.get(_ROUTING_HEADER)
    if raw is None:
        return None
    session: str = raw.decode("latin-1")
    if len(session) > MAX_NAME_LENGTH or not session.isprintable():
        raise RequestError(f"{SESSION_HEADER} must be at most {MAX_NAME_LENGTH} printable characters", SESSION_HEADER)
    return session
