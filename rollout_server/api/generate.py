"""`POST /generate`: the path of every token, kept short."""

from __future__ import annotations

import asyncio
import itertools
import os
import time

from starlette.types import Receive, Scope, Send

from agentloop.wire import MAX_NAME_LENGTH, SESSION_HEADER, GenerateRequest, SamplingParams
from rollout_server.api.asgi import read_body, send_error, send_json
from rollout_server.api.metrics import CLIENT_LEFT, Metrics
from rollout_server.api.parsing import parse
from rollout_server.api.stream import EventStream, encode
from rollout_server.engines.base import Generation, GenerationResult
from rollout_server.errors import RequestError, ServingError, answer_to
from rollout_server.router.router import Router

DISCONNECT_CHECK_S = 0.25
"""Requests that take longer than this are watched for a disconnecting client; for shorter ones a
task costs too much."""

_SESSION_HEADER = SESSION_HEADER.lower().encode()
_ROUTING_HEADER = b"x-smg-routing-key"  # the same in SGLang's own router


class GenerateEndpoint:
    """The ASGI endpoint."""

    def __init__(self, router: Router, metrics: Metrics, *, incremental: bool = False) -> None:
        self._router = router
        self._metrics = metrics
        self._incremental = incremental
        self._numbers = itertools.count()
        self._prefix = f"{os.getpid():x}-{time.time_ns():x}-"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begin = time.perf_counter()
        try:
            request = parse(GenerateRequest, await read_body(scope, receive))
            generation = self.accept(request)
            session = _session(scope) or request.session_id

            if request.stream:
                stream = EventStream(send, generation, incremental=self._incremental, logprobs=request.return_logprob)
                result = await stream.follow(self._run(stream.generation, session, receive))
            else:
                result = await self._run(generation, session, receive)
        except ServingError as exc:
            answer = answer_to(exc)
            self._metrics.count_request(answer.status)
            await send_error(send, answer)
            return

        if result is None:
            self._metrics.count_request(CLIENT_LEFT)
            return
        self._metrics.count_request(200, time.perf_counter() - begin)
        if not request.stream:
            await send_json(send, encode(generation, result, return_logprob=request.return_logprob))

    def accept(self, request: GenerateRequest) -> Generation:
        """Check what depends on the model: vocabulary, context and images.

        Raises:
            RequestError: names the field.
        """
        info, ids, sampling = self._router.info, request.input_ids, request.sampling_params
        if max(ids) >= info.vocab_size or min(ids) < 0:
            place, wrong = next((i, t) for i, t in enumerate(ids) if not 0 <= t < info.vocab_size)
            raise RequestError(
                f"input_ids[{place}] is {wrong}, outside the vocabulary 0..{info.vocab_size - 1}", f"input_ids.{place}"
            )
        self._check_sampled_ids(sampling)

        if len(ids) + sampling.max_new_tokens > info.context_length:
            raise RequestError(
                f"{len(ids)} prompt tokens and max_new_tokens {sampling.max_new_tokens} are more than "
                f"the context of {info.context_length}",
                "input_ids" if len(ids) >= info.context_length else "sampling_params.max_new_tokens",
            )

        rid = request.rid or self._prefix + str(next(self._numbers))
        images = [request.image_data] if isinstance(request.image_data, str) else request.image_data or []
        if images and not info.images:
            raise RequestError("the served model does not take images", "image_data")
        return Generation(rid, ids, sampling, image_data=images)

    def _check_sampled_ids(self, sampling: SamplingParams) -> None:
        vocab_size = self._router.info.vocab_size
        for place, token in enumerate(sampling.stop_token_ids or ()):
            if not 0 <= token < vocab_size:
                raise RequestError(
                    f"stop_token_ids[{place}] is {token}, outside the vocabulary 0..{vocab_size - 1}",
                    f"sampling_params.stop_token_ids.{place}",
                )
        for token in sampling.logit_bias or ():
            if not 0 <= token < vocab_size:
                raise RequestError(
                    f"logit_bias names token {token}, outside the vocabulary 0..{vocab_size - 1}",
                    f"sampling_params.logit_bias.{token}",
                )

    async def _run(self, generation: Generation, session: str | None, receive: Receive) -> GenerationResult | None:
        """Return the result, or None if the client left earlier."""
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
            return await self._router.generate(generation, session)
        except asyncio.CancelledError:
            if left:
                task.uncancel()
                return None
            raise
        finally:
            timer.cancel()
            if watcher is not None:
                watcher.cancel()


def _session(scope: Scope) -> str | None:
    """Return the session that the headers name, or None.

    Raises:
        RequestError: its name is too long, or has control characters.
    """
    headers = dict(scope["headers"])
    raw = headers.get(_SESSION_HEADER) or headers.get(_ROUTING_HEADER)
    if raw is None:
        return None
    session: str = raw.decode("latin-1")
    if len(session) > MAX_NAME_LENGTH or not session.isprintable():
        raise RequestError(f"{SESSION_HEADER} must be at most {MAX_NAME_LENGTH} printable characters", SESSION_HEADER)
    return session
