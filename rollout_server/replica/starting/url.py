"""Replicas that run elsewhere: an agentloop server or a bare SGLang that we do not start."""

from __future__ import annotations

import asyncio
from typing import Any

from agentloop.config.server import ServerSettings
from agentloop.errors import ServerStartError
from rollout_server.engines.base import EngineInfo
from rollout_server.errors import EngineError, RequestError
from rollout_server.replica.base import Replica
from rollout_server.replica.http import HttpReplica
from rollout_server.replica.sglang import UNNAMED_VERSION, SglangReplica

RETRY_S = 0.25


class UrlSource:
    """A server at a URL.

    Args:
        settings: settings of this server.
        url: base URL; also the replica's name.
        info: facts about its engine.
        token: bearer token of that server.
    """

    def __init__(self, settings: ServerSettings, url: str, info: EngineInfo, token: str | None = None) -> None:
        self.name = url
        self._settings = settings
        self._info = info
        self._token = token

    async def start(self) -> Replica:
        settings = self._settings
        link = HttpReplica(
            self.name, self.name, self._info, token=self._token, admin_timeout_s=settings.probe_timeout_s
        )
        try:
            facts = await self._facts(link)
            if not isinstance(facts.get("model_path"), str):
                raise ServerStartError(
                    f"{self.name}/server_info does not name a model_path: it is not a rollout server", "correct the URL"
                )
            ours = "engine" in facts
            # A bare SGLang reports its version only here.
            version_facts = facts if ours else await link.get("/model_info")
        finally:
            await link.close()

        # Events that repeat all tokens so far cost the square of an answer's length: stream only
        # incremental ones.
        incremental = bool(facts.get("incremental_streaming_output"))
        common: dict[str, Any] = {
            "token": self._token,
            "stream_tokens": settings.stream_tokens if incremental else 0,
            "incremental": incremental,
            "admin_timeout_s": settings.probe_timeout_s,
            "update_timeout_s": settings.update_timeout_s,
        }
        if ours:
            version = str(version_facts.get("weight_version", "0"))
            keeps = facts.get("keeps_images") is True
            return HttpReplica(self.name, self.name, self._info, version=version, keeps_images=keeps, **common)
        return SglangReplica(
            self.name,
            self.name,
            self._info,
            version=str(version_facts.get("weight_version", UNNAMED_VERSION)),
            on_gpu=facts.get("device") == "cuda",
            overlap=not facts.get("disable_overlap_schedule"),
            tensor_parallel=_tensor_parallel(facts, self.name),
            image_cache=True,
            **common,
        )

    async def _facts(self, link: HttpReplica) -> dict[str, Any]:
        """Return what the server reports about itself, once it answers.

        Raises:
            ServerStartError: it refuses the request, or does not answer in time.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.start_timeout_s
        while True:
            try:
                return await link.get("/server_info")
            except (EngineError, RequestError) as exc:
                if loop.time() > deadline or isinstance(exc, RequestError):
                    raise ServerStartError(
                        f"{self.name} does not answer as a rollout server: {exc}",
                        "give its token (--replica-token-env)"
                        if isinstance(exc, RequestError) and "token" in exc.message
                        else "start it, or correct the URL",
                    ) from exc
                await asyncio.sleep(RETRY_S)

    async def ended(self) -> str:
        await asyncio.Event().wait()  # the end of that process is not reported: probes detect it
        raise AssertionError("unreachable")

    async def stop(self, *, gently: bool) -> None:
        """Do nothing: this server did not start it."""


def _tensor_parallel(facts: dict[str, Any], name: str) -> int:
    """Return how many ranks a server takes in an update group.

    Raises:
        ServerStartError: it reports something else than a number.
    """
    ranks = facts.get("tp_size") or 1
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
        raise ServerStartError(
            f"{name}/server_info reports the tp_size {repr(ranks)[:80]}, which is not a positive whole number",
            "check that the URL is a rollout server's",
        )
    return ranks
