"""The answer of `/generate`: whole as JSON, or as server-sent events while it is sampled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from typing import Any

import orjson
from starlette.types import Send

from rollout_server.engines.base import AnswerChunk, Generation, GenerationResult

_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]


class EventWriter:
    """Writes server-sent events in SGLang's form: `data: <json>`, at the end `data: [DONE]`.

    Attributes:
        started: whether the status has been sent.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

    async def event(self, data: bytes) -> None:
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await self._send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


class EventStream:
    """The events of one answer.

    Attributes:
        generation: the request to run; its chunks become events.

    Args:
        writer: of the whole response.
        generation: the request as accepted.
        incremental: each event holds the new tokens; else all tokens so far, which is SGLang's
            default.
        logprobs: whether events hold logprobs.
        index: number of the answer in a batch, which its events name; None: it is the only one.
    """

    def __init__(
        self,
        writer: EventWriter,
        generation: Generation,
        *,
        incremental: bool,
        logprobs: bool,
        index: int | None = None,
    ) -> None:
        self._writer = writer
        self._incremental = incremental
        self._logprobs = logprobs
        self._index = index
        self._chunks: asyncio.Queue[AnswerChunk | None] = asyncio.Queue()
        self._ids: list[int] = []
        self._pairs: list[tuple[float, int, None]] = []
        self._sent = 0

        self.generation = replace(
            generation,
            on_chunk=self._chunks.put_nowait,
            stream_tokens=generation.sampling.stream_interval or 1,
        )

    async def follow(self, answer: Awaitable[GenerationResult]) -> GenerationResult:
        """Write events until the answer is complete.

        Raises:
            ServingError: the answer failed.
        """
        writer = asyncio.create_task(self._write())
        try:
            result = await answer
            self._chunks.put_nowait(None)
            await writer
        finally:
            writer.cancel()

        start = self._sent if self._incremental else 0
        fields = answer_fields(self.generation, result, return_logprob=self._logprobs, start=start)
        await self._writer.event(self._json(fields))
        return result

    async def _write(self) -> None:
        while (chunk := await self._chunks.get()) is not None:
            await self._writer.event(self._encode(chunk))

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
        return self._json({"output_ids": self._ids, "meta_info": meta})

    def _json(self, fields: dict[str, Any]) -> bytes:
        return orjson.dumps(fields if self._index is None else {**fields, "index": self._index})


def encode(generation: Generation, result: GenerationResult, *, return_logprob: bool) -> bytes:
    """Return the `GenerateResponse` as JSON."""
    return orjson.dumps(answer_fields(generation, result, return_logprob=return_logprob))


def answer_fields(
    generation: Generation, result: GenerationResult, *, return_logprob: bool, start: int = 0
) -> dict[str, Any]:
    """Return the fields of a `GenerateResponse`, with the tokens from index `start` on."""
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
    return {"output_ids": result.output_ids[start:] if start else result.output_ids, "meta_info": meta}
