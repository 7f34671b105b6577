"""A rollout server that answers at once with canned ids, for `workers.py`: 20 us of CPU a request.

    python benchmarks/canned_server.py ANSWERS.json

ANSWERS.json holds `{"turns": [[id, ...], ...], "context_length": n, "delay_s": s}`: the n-th request of a session gets
the n-th turn, the last one again from then on. Prints its URL.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections import Counter
from pathlib import Path

import orjson
import uvloop

SESSION = re.compile(rb"x-session-id: *([^\r]*)\r", re.IGNORECASE)
LENGTH = re.compile(rb"content-length: *(\d+)\r", re.IGNORECASE)


class Canned(asyncio.Protocol):
    """One connection."""

    def __init__(self, turns: list[list[int]], context_length: int, delay_s: float, sessions: Counter[bytes]) -> None:
        self._turns = turns
        self._delay_s = delay_s
        self._sessions = sessions
        self._info = _whole(orjson.dumps({"context_length": context_length}))
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._buffer[: end + 2])
            length = int(found[1]) if (found := LENGTH.search(head)) else 0
            if len(self._buffer) < end + 4 + length:
                return
            body = bytes(self._buffer[end + 4 : end + 4 + length])
            del self._buffer[: end + 4 + length]
            if self._delay_s and body:
                asyncio.get_running_loop().call_later(self._delay_s, self._send, self._answer(head, body))
            else:
                self._send(self._answer(head, body))

    def _send(self, answer: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(answer)  # type: ignore[attr-defined]  # a transport that writes

    def _answer(self, head: bytes, body: bytes) -> bytes:
        if not body:
            return self._info
        session = found[1] if (found := SESSION.search(head)) else b""
        turn = self._turns[min(self._sessions[session], len(self._turns) - 1)]
        self._sessions[session] += 1
        start = body.index(b'"input_ids":') + len(b'"input_ids":')
        prompt = body.count(b",", start, body.index(b"]", start)) + 1
        meta = {
            "id": "r", "finish_reason": {"type": "stop"}, "prompt_tokens": prompt, "completion_tokens": len(turn),
            "cached_tokens": 0, "weight_version": "0", "output_token_logprobs": [[-0.5, token, None] for token in turn],
        }  # fmt: skip
        return _whole(orjson.dumps({"output_ids": turn, "meta_info": meta}))


def _whole(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


async def serve(answers: dict[str, object]) -> None:
    """Serve until the process is ended."""
    sessions: Counter[bytes] = Counter()
    server = await asyncio.get_running_loop().create_server(
        lambda: Canned(**answers, sessions=sessions),
        "127.0.0.1",
        0,
        backlog=4096,  # type: ignore[arg-type]
    )
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(json.loads(Path(sys.argv[1]).read_text())))
