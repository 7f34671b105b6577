"""A new policy version on its way to the server: written whole by the trainer, loaded between two decode steps."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any, Protocol

import httpx

from agentloop.errors import RequestRejected, ServerError
from agentloop.wire import PauseRequest, UpdateWeightsFromDiskRequest


class WritesWeights(Protocol):
    """The part of a `WorkerGroup` that a publisher needs."""

    async def publish(self, folder: Path) -> None: ...


class DiskPublisher:
    """Publishes through a folder of safetensors that trainer and server both see.

    The server may die and be started again in the middle: the restarted one already starts from the new folder, so the
    publisher repeats the update until the server says that it serves the version.
    """

    def __init__(self, url: str, *, running: str, token: str | None, timeout_s: float) -> None:
        self._running = running
        self._timeout_s = timeout_s
        self._http = httpx.AsyncClient(
            base_url=url,
            timeout=timeout_s,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            trust_env=False,  # no proxy between a run and its server
        )

    async def update(self, version: int, folder: Path) -> float:
        """Make the server serve `folder` as `version`; returns the seconds it took.

        Raises:
            ServerError: the server could not be made to serve it within the time limit.
            RequestRejected: the server refuses the folder.
        """
        begin = time.perf_counter()
        pause: float = 0.05
        while True:
            try:
                await self._post("/pause_generation", PauseRequest(mode=self._running).model_dump())  # type: ignore[arg-type]
                try:
                    request = UpdateWeightsFromDiskRequest(model_path=str(folder), weight_version=str(version))
                    await self._post("/update_weights_from_disk", request.model_dump())
                finally:
                    await self._post("/continue_generation", {})
                if await self.served_version() == version:
                    return time.perf_counter() - begin
                reason = f"the server still serves version {await self.served_version()}"
            except (httpx.TransportError, ServerError) as exc:
                reason = str(exc) or type(exc).__name__
            if time.perf_counter() - begin > self._timeout_s:
                raise ServerError(
                    f"version {version} could not be published in {self._timeout_s:.0f} s: {reason}",
                    "see logs/server.log",
                )
            await asyncio.sleep(pause)
            pause = min(2.0, 2 * pause)

    async def served_version(self) -> int:
        """The version that the server says it serves."""
        answer = await self._http.get("/server_info")
        _raise_for(answer)
        version = answer.json().get("weight_version", "0")
        return int(version) if str(version).isdigit() else 0

    async def close(self) -> None:
        await self._http.aclose()

    async def _post(self, path: str, body: dict[str, Any]) -> None:
        _raise_for(await self._http.post(path, json=body))


def _raise_for(answer: httpx.Response) -> None:
    if answer.status_code >= 500:
        raise ServerError(f"{answer.request.url.path} answered {answer.status_code}: {answer.text[:300]}")
    if answer.status_code >= 400:
        raise RequestRejected(f"{answer.request.url.path} was refused with {answer.status_code}: {answer.text[:300]}")
