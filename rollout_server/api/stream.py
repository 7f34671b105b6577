"""The answer of `/generate`: whole as JSON, or as server-sent events while it is sampled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from typing import Any

import orjson
from starlette.types import Send

from rollout_server.engines.base import AnswerChunk, Generation, GenerationResult
from rollout_server.errors import ServingError, answer_to

_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]


class EventStream:
    """The events of one answer, in SGLang's form: `data: <json>`, at the end `data: [DONE]`.

    Attributes:
        generation: the request to run; its chunks become events.

    Args:
        generation: the request as accepted.
        incremental: each event holds the new tokens; else all tokens so far, which is SGLang's
            default.
        logprobs: whether events hold logprobs.
    """

    def __init__(self, send: Send, generation: Generation, *, incremental: bool, logprobs: bool) -> None:
        self._send = send
        self._incremental = incremental
        self._logprobs = logprobs
        self._chunks: asyncio.Queue[AnswerChunk | None] = asyncio.Queue()
        self._ids: list[int] = []
        self._pairs: list[tuple[float, int, None]] = []
        self._sent = 0
        self._started = False

        self.generation = replace(
            generation,
            on_chunk=self._chunks.put_nowait,
            stream_tokens=generation.sampling.stream_interval or 1,
        )

    async def follow(self, answer: Awaitable[GenerationResult | None]) -> GenerationResult | None:
        """Send events until the answer is complete; return None if the client left.

        Raises:
            ServingError: before the first event. A later error is sent as an event, because the
                status has been sent.
        """
        writer = asyncio.create_task(self._write())
        try:
            result = await answer
            self._chunks.put_nowait(None)
            await writer
        except ServingError as exc:
            if not self._started:
                raise
            await self._event(answer_to(exc).body)
            await self._end()
            return None
        finally:
            writer.cancel()

        if result is not None:
            start = self._sent if self._incremental else 0
            await self._event(encode(self.generation, result, return_logprob=self._logprobs, start=start))
            await self._end()
        return result

    async def _write(self) -> None:
        while (chunk := await self._chunks.get()) is not None:
            await self._event(self._encode(chunk))

    def _encode(self, chunk: AnswerChunk) -> bytes:
        pairs = [(logprob, token, None) for logprob, token in zip(chunk.logprobs, chunk.output_ids, strict=True)]
        self._sent += len(pairs)
        if self._incremental:
            self._ids, self._pairs = chunk.output_ids, pairs
        else:
            self._ids = self._ids + chunk.output_ids
            self._pairs = self._pairs + pairs

        meta: dict[str, Any] = {
            "id": self.generation.rid,
            "finish_reason": None,
            "prompt_tokens": len(self.generation.input_ids),
            "completion_tokens": self._sent,
            "weight_version": chunk.spans[-1].version,
            "weight_versions": [{"version": s.version, "start": s.start, "end": s.end} for s in chunk.spans],
        }
        if self._logprobs:
            meta["output_token_logprobs"] = self._pairs
        return orjson.dumps({"output_ids": self._ids, "meta_info": meta})

    async def _event(self, data: bytes) -> None:
        if not self._started:
            self._started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})

        await self._send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})

    async def _end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def encode(generation: Generation, result: GenerationResult, *, return_logprob: bool, start: int = 0) -> bytes:
    """Return the `GenerateResponse` as JSON, with the tokens from index `start` on."""
    finish: dict[str, Any] = {"type": result.finish}
    if result.finish == "stop":
        finish["matched"] = result.matched
    elif result.finish == "length":
        finish["length"] = generation.sampling.max_new_tokens
    else:
        finish["message"] = result.message

    meta: dict[str, Any] = {
        "id": generation.rid,
        "finish_reason": finish,
        "prompt_tokens": len(generation.input_ids),
        "completion_tokens": len(result.output_ids),
        "cached_tokens": result.cached_tokens,
        "weight_version": result.weight_version,
        "weight_versions": [{"version": s.version, "start": s.start, "end": s.end} for s in result.spans],
    }
    if return_logprob:
        meta["output_token_logprobs"] = [
            (logprob, token, None)
            for logprob, token in zip(result.logprobs[start:], result.output_ids[start:], strict=True)
        ]
    return orjson.dumps({"output_ids": result.output_ids[start:] if start else result.output_ids, "meta_info": meta})
