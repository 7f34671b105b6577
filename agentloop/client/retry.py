"""Decide when to send a failed request again: growing pauses, and two limits for giving up.

There are two kinds of failure. A *failure* is an attempt that the server or the network broke;
failures count against `retries`. An *outage* is a server that accepts no connection or answers with
Retry-After; only its duration counts, against `outage_s`, so no request is lost if the server is
restarted in time.
"""

from __future__ import annotations

import random
import time

from agentloop.errors import ServerError

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 8.0

LONGEST_POLL_S = 1.0
"""Longest pause while a server is unreachable: requests should resume soon after it is back."""


class Retries:
    """The attempts of one request: how many have failed, and how long to wait before the next.

    Args:
        retries: further attempts after a failure; 0 also means not to wait for an outage to end.
        outage_s: how long an outage may last.
    """

    def __init__(self, retries: int, outage_s: float) -> None:
        self._retries = retries
        self._outage_s = outage_s
        self._failures = 0
        self._pause = FIRST_PAUSE_S
        self._outage_since: float | None = None

    def after_failure(self, failure: str) -> float:
        """Return the seconds to wait after a failed attempt.

        Raises:
            ServerError: too many attempts have failed.
        """
        self._outage_since = None
        self._failures += 1
        if self._failures > self._retries:
            raise ServerError(
                f"a generation failed {self._failures} times; last error: {failure}",
                "see logs/server.log; rollout.retries sets the number of retries",
            )
        return self._next_pause(LONGEST_PAUSE_S)

    def after_outage(self, failure: str, wanted: float | None = None) -> float:
        """Return the seconds to wait in an outage; `wanted`: the server's Retry-After.

        Raises:
            ServerError: the outage has lasted too long.
        """
        now = time.monotonic()
        if self._outage_since is None:
            self._outage_since = now

        lasted = now - self._outage_since
        if not self._retries or lasted >= self._outage_s:
            raise ServerError(
                f"the rollout server has been unavailable for {lasted:.0f} s: {failure}",
                "see logs/server.log",
            )

        if wanted is None:
            return self._next_pause(LONGEST_POLL_S)
        return max(wanted, FIRST_PAUSE_S) * random.uniform(1.0, 1.25)

    def _next_pause(self, longest: float) -> float:
        # With jitter: the requests of a batch fail together and must not all return together.
        pause = min(self._pause, longest) * random.uniform(0.75, 1.25)
        self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
        return pause
