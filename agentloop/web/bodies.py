"""Read a request's body within a bound, gzip included."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import orjson
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from agentloop.files import read_json
from agentloop.web.refusals import Refusal
from agentloop.wire import PACKINGS, unpacked

MAX_BODY_BYTES = 64 * 2**20
"""Most bytes of a body, as sent and as unpacked. weave's client splits what is over 31 MiB."""

LARGE = 2**20
"""Bytes of a body that is parsed in a thread, so that other requests go on."""

_LARGE_AT_ONCE = asyncio.Semaphore(2)
"""Bounds the memory that large bodies take when they are unpacked and parsed."""

Result = TypeVar("Result")


async def read_body(request: Request, limit: int = MAX_BODY_BYTES) -> bytes:
    """Return the whole body, unpacked.

    Raises:
        Refusal: it is larger than `limit`, or packed in another way than gzip or deflate.
    """
    declared = request.headers.get("content-length", "0")
    if declared.isascii() and declared.isdecimal() and (len(declared) > 18 or int(declared) > limit):
        raise _too_large(limit)
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > limit:
                raise _too_large(limit)
    except ClientDisconnect as exc:
        raise Refusal(400, "the client disconnected before its body was read") from exc
    body = b"".join(parts)
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        return body
    async with _LARGE_AT_ONCE:  # a small body may be a large one once it is unpacked
        return await run_in_threadpool(_unpack, body, encoding, limit)


async def read_object(request: Request, limit: int = MAX_BODY_BYTES) -> dict[str, Any]:
    """Return the body, a JSON object.

    Raises:
        Refusal: it is not one, or is too large.
    """
    body = await read_body(request, limit)
    return _parsed(body) if len(body) <= LARGE else await in_thread(body, _parsed)


async def in_thread(body: bytes, function: Callable[[bytes], Result]) -> Result:
    """Return `function(body)`, computed in a thread; two large bodies at once."""
    async with _LARGE_AT_ONCE if len(body) > LARGE else nullcontext():
        return await run_in_threadpool(function, body)


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        found = read_json(body or b"{}")
    except orjson.JSONDecodeError as exc:
        raise Refusal(400, f"the body is not JSON: {exc}") from exc
    except ValueError as exc:
        raise Refusal(400, f"the body cannot be read: {exc}") from exc
    if not isinstance(found, dict):
        raise Refusal(400, f"the body must be a JSON object, not {type(found).__name__}")
    return found


def _unpack(body: bytes, encoding: str, limit: int) -> bytes:
    if encoding not in PACKINGS:
        raise Refusal(415, f"Content-Encoding {encoding!r} is not supported", "send gzip, deflate or identity")
    try:
        return unpacked(body, encoding, limit)
    except OverflowError:
        raise _too_large(limit) from None
    except ValueError as exc:
        raise Refusal(400, f"the body cannot be unpacked: {exc}", "pack the whole body as one member") from exc


def _too_large(limit: int) -> Refusal:
    return Refusal(413, f"the body is larger than {limit} bytes", "send it in parts")
