"""The load of `rollout.py`: requests over plain HTTP/1.1 with as little work of its own as possible, and its clock.

An event loop over sockets and no library: the generator must not be what is measured. Answers are kept as bytes with
the time at which each part came, and are parsed when the clock has stopped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Answer:
    """Body of an answer, and when it came. `parts`: (seconds since it was sent, bytes) of each piece of a stream."""

    status: int = 0
    seconds: float = 0.0
    body: bytes = b""
    parts: list[tuple[float, bytes]] = field(default_factory=list)


class Connections:
    """Connections to one server that stay open, one for each request under way."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def open(self, count: int) -> None:
        """Have so many idle ones, so that no request pays for its connection."""
        while len(self._idle) < count:
            self._idle.append(await asyncio.open_connection("127.0.0.1", self._port, limit=2**26))

    async def post(self, path: str, body: bytes, headers: Sequence[str] = ()) -> Answer:
        """Send one request and read its whole answer.

        Raises:
            RuntimeError: the status is not 200.
        """
        if not self._idle:
            await self.open(1)
        reader, writer = self._idle.pop()
        begin = time.perf_counter()
        more = "".join(f"{line}\r\n" for line in headers)
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n{more}"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        answer = await _read(reader, begin)
        answer.seconds = time.perf_counter() - begin
        self._idle.append((reader, writer))
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {answer.body[:500]!r}")
        return answer

    async def close(self) -> None:
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()


async def _read(reader: asyncio.StreamReader, begin: float) -> Answer:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    answer = Answer(status=int(head.split(b" ", 2)[1]))
    if b"transfer-encoding: chunked" in head:
        while size := int(await reader.readuntil(b"\r\n"), 16):
            answer.parts.append((time.perf_counter() - begin, (await reader.readexactly(size + 2))[:-2]))
        await reader.readexactly(2)
        answer.body = b"".join(data for _, data in answer.parts)
    else:
        length = head.split(b"content-length:")[1].split(b"\r\n")[0]
        answer.body = await reader.readexactly(int(length))
    return answer


def events(answer: Answer) -> list[tuple[float, bytes]]:
    """(seconds, JSON) of each server-sent event but the closing `[DONE]`; one in parts has the time of its last."""
    found, rest = [], b""
    for seconds, data in answer.parts:
        rest += data.replace(b"\r\n", b"\n")
        *whole, rest = rest.split(b"\n\n")
        for event in whole:
            payload = event.removeprefix(b"data:").strip()
            if payload != b"[DONE]":
                found.append((seconds, payload))
    return found


def quantile(values: Sequence[float], share: float) -> float:
    """Nearest-rank quantile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass(slots=True)
class Work:
    """What one request asks for."""

    prompt: list[int]
    new_tokens: int
    session: str | None = None


@dataclass(slots=True)
class Outcome:
    """What came of it."""

    ids: list[int]
    logprobs: list[float]
    cached_tokens: int = 0


def check(work: Sequence[Work], outcomes: Sequence[Outcome], name: str) -> None:
    """Stop when an answer is not what was asked for: then the seconds compare nothing."""
    for one, outcome in zip(work, outcomes, strict=True):
        counts = (len(outcome.ids), len(outcome.logprobs))
        if counts != (one.new_tokens, one.new_tokens) or not all(value <= 1e-3 for value in outcome.logprobs):
            raise SystemExit(f"{name}: {counts} ids and logprobs in an answer, not {one.new_tokens} each")
