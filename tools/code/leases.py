"""`Leases`: keep the sessions of running episodes, and no others, alive in the sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging

from agentloop.errors import AgentloopError
from tools.http import ServiceClient

log = logging.getLogger(__name__)

LEASE_S = 120.0
"""A session ends when the sandbox has heard nothing of it for so long: its run was killed."""

RENEW_S = 30.0
"""Seconds between renewals; fewer, if the sandbox grants shorter leases."""


class Leases:
    """Renews the leases of open sessions in the background.

    An episode may generate for longer than any lease that would end a killed run's sessions soon,
    so the lease is short and renewed for as long as this process lives.

    Args:
        client: of the sandbox's `/renew_sessions`.
    """

    def __init__(self, client: ServiceClient) -> None:
        self._client = client
        self._open: set[str] = set()
        self._pause_s = RENEW_S
        self._task: asyncio.Task[None] | None = None

    def add(self, session: str, lease_s: float) -> None:
        """Renew a session's lease, which lasts for `lease_s`, from now on."""
        loop = asyncio.get_running_loop()
        self._open.add(session)
        self._pause_s = min(RENEW_S, lease_s / 4)
        if self._task is None or self._task.done() or self._task.get_loop() is not loop:
            # Without the context of the episode that happens to be the first.
            self._task = loop.create_task(self._renew(), name="leases", context=contextvars.Context())

    def drop(self, session: str) -> None:
        """Renew a session's lease no more."""
        self._open.discard(session)
        if not self._open and self._task is not None:
            with contextlib.suppress(RuntimeError):  # its event loop is closed
                self._task.cancel()
            self._task = None

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._pause_s)
            try:
                await self._client.post({"session_ids": sorted(self._open)}, self)
            except AgentloopError as exc:  # a sandbox that is away is the calls' matter, which wait for it
                log.debug("leases were not renewed: %s", exc)
