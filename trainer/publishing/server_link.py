"""The trainer's admin connection to the rollout server: weight updates, pauses, server facts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import httpx

from agentloop.client.connections import ConnectionPool
from agentloop.errors import RequestRejected, ServerError
from agentloop.wire import PauseRequest, bearer

OWN_FIELDS = ("running", "checksum", "bucket_bytes", "copy_path")
"""Fields of an update that a bare SGLang does not know."""

MOST_CONNECTIONS = 16
"""Requests in flight at once; there is rarely more than one."""

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0


class Conflict(Exception):
    """The server answered 409: its replicas have changed since the request was made."""


class ServerLink:
    """A client of one server's admin endpoints.

    Args:
        url: of the server.
        running: the treatment of requests that run during an update.
        timeout_s: of a request, and of all attempts at one update together.
    """

    def __init__(
        self, url: str, *, running: Literal["retract", "in_place", "wait"], token: str | None, timeout_s: float
    ) -> None:
        self._mode: Literal["retract", "in_place", "wait"] = running
        self._timeout_s = timeout_s
        self._is_ours: bool | None = None
        self._http = httpx.AsyncClient(
            base_url=url,
            timeout=timeout_s,
            headers={"Authorization": bearer(token)} if token else {},
            trust_env=False,  # no proxy for requests to the rollout server
            # httpx's own transport would load certificates and two more libraries, while the
            # first step waits.
            transport=ConnectionPool(MOST_CONNECTIONS),
        )

    @property
    def running(self) -> Literal["retract", "in_place"]:
        """The mode as a field of an update. With `wait`, nothing is running when it is sent."""
        return "in_place" if self._mode == "in_place" else "retract"

    async def update(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send one weight update and return the answer.

        Our server reads the weights before it pauses, so that requests wait only while it changes
        them. A bare SGLang reads them in the pause, and without one would wait for all requests to
        end.
        """
        ours = await self._ours()
        if ours and self._mode != "wait":
            return await self.post(path, body)

        if not ours:
            body = {key: value for key, value in body.items() if key not in OWN_FIELDS}

        mode = "retract" if self._mode == "wait" and not ours else self._mode
        await self.post("/pause_generation", PauseRequest(mode=mode).model_dump())
        try:
            return await self.post(path, body)
        finally:
            await self.post("/continue_generation", {})

    async def release_memory(self) -> None:
        """Let running requests end, hold new ones back, and release the engine's device memory.

        Raises:
            RequestRejected: the engine cannot.
        """
        mode: Literal["wait", "retract"] = "wait" if await self._ours() else "retract"
        await self.post("/pause_generation", PauseRequest(mode=mode).model_dump())
        try:
            await self.post("/release_memory_occupation", {"tags": ["kv_cache", "weights"]})
        except Conflict as exc:
            raise RequestRejected(str(exc), "serve with --memory-saver, or set rollout.colocated=false") from exc

    async def resume_memory(self, tag: Literal["weights", "kv_cache"]) -> None:
        """Allocate a part of the engine's device memory again. Weights come with the next
        update."""
        await self.post("/resume_memory_occupation", {"tags": [tag]})

    async def continue_generation(self) -> None:
        """Answer the requests that were held back."""
        await self.post("/continue_generation", {})

    async def until_served(self, version: int, attempt: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        """Repeat `attempt` until the server confirms that it serves `version`.

        Raises:
            ServerError: it did not confirm within the time limit.
            RequestRejected: it refuses the weights.
        """
        begin = time.perf_counter()
        pause = FIRST_PAUSE_S
        while True:
            try:
                answer = await attempt()
                # Our server answers an update after all its replicas have confirmed it.
                if answer.get("weight_version") == str(version):
                    return
                served = await self.served_version()
                if served == version:
                    return
                reason = f"the server still serves version {served}"
            except (httpx.TransportError, ServerError, Conflict) as exc:
                reason = str(exc) or type(exc).__name__

            if time.perf_counter() - begin > self._timeout_s:
                raise ServerError(
                    f"version {version} could not be published in {self._timeout_s:.0f} s: {reason}",
                    "see logs/server.log",
                )
            await asyncio.sleep(pause)
            pause = min(LONGEST_PAUSE_S, 2 * pause)

    async def served_version(self) -> int:
        """Return the version that the server reports; 0 if it is not a number."""
        version = str((await self._get("/server_info")).get("weight_version", "0"))
        return int(version) if version.isdigit() else 0

    async def facts(self) -> dict[str, Any]:
        """Return what the server says of itself and its replicas.

        Raises:
            ServerError: it does not answer.
        """
        return await self._get("/server_info")

    async def serving_ranks(self) -> int:
        """Return the number of ranks that the serving replicas have in a weight update group."""
        facts = await self._get("/server_info")
        if "engine" not in facts:
            return int(facts.get("tp_size") or 1)
        return sum(int(state["ranks"]) for state in facts["states"] if state["state"] == "serving")

    async def post(self, path: str, body: dict[str, Any], *, ignore: bool = False) -> dict[str, Any]:
        """Send a POST request and return the answer.

        Args:
            ignore: return an empty answer instead of raising an error.

        Raises:
            RequestRejected: 4xx.
            Conflict: 409.
            ServerError: 5xx, or no answer.
        """
        try:
            answer = await self._http.post(path, json=body)
        except httpx.TransportError as exc:
            if ignore:
                return {}
            raise ServerError(f"{path} got no answer: {exc or type(exc).__name__}") from exc

        if not ignore:
            _raise_for(answer)

        try:
            decoded = answer.json()
        except ValueError:
            return {}  # SGLang answers some requests with plain text
        return decoded if isinstance(decoded, dict) else {}

    async def close(self) -> None:
        await self._http.aclose()

    async def _ours(self) -> bool:
        """Whether it is our server, and not a bare SGLang."""
        if self._is_ours is None:
            self._is_ours = "engine" in await self._get("/server_info")
        return self._is_ours

    async def _get(self, path: str) -> dict[str, Any]:
        try:
            answer = await self._http.get(path)
        except httpx.TransportError as exc:
            raise ServerError(f"{path} got no answer: {exc or type(exc).__name__}") from exc
        _raise_for(answer)
        facts: dict[str, Any] = answer.json()
        return facts


def _raise_for(answer: httpx.Response) -> None:
    path, text = answer.request.url.path, answer.text[:300]
    if answer.status_code >= 500:
        raise ServerError(f"{path} answered {answer.status_code}: {text}")
    if answer.status_code == 409:
        raise Conflict(f"{path} was refused with 409: {text}")
    if answer.status_code >= 400:
        raise RequestRejected(f"{path} was refused with {answer.status_code}: {text}")
