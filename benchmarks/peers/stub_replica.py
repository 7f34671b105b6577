"""A replica that costs next to nothing: SGLang's dialect over a raw asyncio protocol, with made-up tokens.

`instant` answers at once: what is left of a request's time is the router's. `timed` works like an engine with
continuous batching: a step takes `STEP_S` and `ROW_S` for each running request and gives each of those one token,
tokens of a prompt that are not cached take `PREFILL_S` each, and what finishes stays cached.

    python benchmarks/peers/stub_replica.py PORT instant|timed
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import httptools

STEP_S, ROW_S, PREFILL_S = 4e-3, 1e-4, 2e-5
MAX_RUNNING = 16
VERSION = "0"

FACTS = {
    "success": True, "is_generation": True, "weight_version": VERSION, "model_path": "stub", "version": "0",
    "incremental_streaming_output": True, "tokenizer_path": "stub", "served_model_name": "stub",
    "model_type": "qwen2", "architectures": [], "dp_size": 1,
}  # fmt: skip
"""What it says to every other path."""


class Engine:
    """The time model of one replica."""

    def __init__(self) -> None:
        self._waiting: list[tuple[dict[str, Any], asyncio.Future[int]]] = []
        self._running: list[list[Any]] = []
        self._cached: dict[tuple[int, ...], int] = {}
        self._wake = asyncio.Event()

    async def generate(self, request: dict[str, Any]) -> int:
        """Wait for the last token; returns how many of the prompt's tokens were cached."""
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        self._wake.set()
        return await future

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if not self._waiting and not self._running:
                self._wake.clear()
                await self._wake.wait()
            seconds = STEP_S
            while self._waiting and len(self._running) < MAX_RUNNING:
                request, future = self._waiting.pop(0)
                ids = request["input_ids"]
                cached = min(self._cached.get(tuple(ids[:8]), 0), len(ids) - 1)
                seconds += PREFILL_S * (len(ids) - cached)
                self._running.append([request["sampling_params"]["max_new_tokens"], request, future, cached])
            end = loop.time() + seconds + ROW_S * len(self._running)
            await asyncio.sleep(max(0.0, end - loop.time()))
            for entry in self._running:
                entry[0] -= 1
            for left, request, future, cached in self._running:
                if left <= 0:
                    ids = request["input_ids"]
                    self._cached[tuple(ids[:8])] = len(ids) + request["sampling_params"]["max_new_tokens"]
                    if not future.done():
                        future.set_result(cached)
            self._running = [entry for entry in self._running if entry[0] > 0]


class Connection(asyncio.Protocol):
    """One client's requests, one after the other."""

    def __init__(self, engine: Engine | None) -> None:
        self._engine = engine

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._body = b""

    def on_url(self, url: bytes) -> None:
        self._url = url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._url != b"/generate":
            self._answer(FACTS)
            return
        request = json.loads(self._body)
        if self._engine is None:
            self._answer(answer(request, 0))
        else:
            asyncio.get_running_loop().create_task(self._work(self._engine, request))

    async def _work(self, engine: Engine, request: dict[str, Any]) -> None:
        cached = await engine.generate(request)
        if request.get("stream"):
            event = b"data: " + json.dumps(answer(request, cached)).encode() + b"\n\ndata: [DONE]\n\n"
            self._write(b"text/event-stream", event)
        else:
            self._answer(answer(request, cached))

    def _answer(self, body: dict[str, Any]) -> None:
        self._write(b"application/json", json.dumps(body).encode())

    def _write(self, kind: bytes, data: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n" % (kind, len(data))
        self._transport.write(head + data)


def answer(request: dict[str, Any], cached: int) -> dict[str, Any]:
    """What SGLang would say."""
    new = request["sampling_params"]["max_new_tokens"]
    return {
        "output_ids": list(range(10, 10 + new)) if new <= 64 else [10] * new,
        "meta_info": {
            "id": request.get("rid") or "x", "finish_reason": {"type": "length", "length": new},
            "prompt_tokens": len(request["input_ids"]), "completion_tokens": new, "cached_tokens": cached,
            "weight_version": VERSION, "weight_versions": [{"version": VERSION, "start": 0, "end": new}],
            "output_token_logprobs": [[-0.5, 10 + i if new <= 64 else 10, None] for i in range(new)],
        },
    }  # fmt: skip


async def main(port: int, mode: str) -> None:
    engine = Engine() if mode == "timed" else None
    server = await asyncio.get_running_loop().create_server(lambda: Connection(engine), "127.0.0.1", port)
    if engine is not None:
        asyncio.get_running_loop().create_task(engine.run())
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
