"""Decide when to send a failed request again: growing pauses, and two limits for giving up.

There are two kinds of failure. A *failure* is an attempt that the server or the network broke;
failures count against `retries`. An *outage* is a server that accepts no connection or answers with
Retry-After; only its duration counts, against `outage_s`, so no request is lost if the server is
restarted in time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime

from agentloop.errors import AgentloopError, ServerError

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 8.0

FORGOTTEN_S = 30.0
"""An outage that no request has met for this long is over; another one begins anew."""

LONGEST_POLL_S = 1.0
"""Longest pause while a server is unreachable: requests should resume soon after it is back."""


class Outage:
    """How long the server has accepted no connection, as all requests of a client have seen it.

    Without a common clock, each wave of requests against a dead server would wait anew.

    Args:
        clock: returns the time in seconds; None: `time.monotonic`.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self.clock = clock or time.monotonic
        self._since = 0.0
        self._seen = float("-inf")

    def lasted(self) -> float:
        """Note a refused connection; return the seconds since the first of the outage."""
        now = self.clock()
        if now - self._seen > FORGOTTEN_S:
            self._since = now
        self._seen = now
        return now - self._since

    def over(self) -> None:
        """Note an answer."""
        self._seen = float("-inf")


class Retries:
    """The attempts of one request: how many have failed, and how long to wait before the next.

    Of a generation; a subclass for requests to another server has the errors of its own.

    Args:
        retries: further attempts after a failure; 0 also means not to wait for an outage to end.
        outage_s: how long an outage may last.
        outage: the outage of the client's server.
    """

    def __init__(self, retries: int, outage_s: float, outage: Outage | None = None) -> None:
        self._retries = retries
        self._outage_s = outage_s
        self._failures = 0
        self._pause = FIRST_PAUSE_S
        self._outage = outage or Outage()
        self._overloaded_since: float | None = None

    def after_failure(self, failure: str) -> float:
        """Return the seconds to wait after a failed attempt.

        Raises:
            ServerError: too many attempts have failed.
        """
        self._overloaded_since = None
        self._failures += 1
        if self._failures > self._retries:
            raise self._gave_up(self._failures, failure)
        return self._next_pause(LONGEST_PAUSE_S)

    def after_outage(self, failure: str, wanted: float | None = None) -> float:
        """Return the seconds to wait in an outage; `wanted`: the server's Retry-After.

        Raises:
            ServerError: the outage has lasted too long.
        """
        if wanted is None:
            lasted = self._outage.lasted()
        else:  # it answers: how long this request has waited counts
            now = self._outage.clock()
            self._overloaded_since = self._overloaded_since or now
            lasted = now - self._overloaded_since
        if not self._retries or lasted >= self._outage_s:
            raise self._unavailable(lasted, failure)

        if wanted is None:
            return self._next_pause(LONGEST_POLL_S)
        return max(wanted, FIRST_PAUSE_S) * random.uniform(1.0, 1.25)

    def _gave_up(self, failures: int, failure: str) -> AgentloopError:
        """Return the error of a request that failed too often."""
        return ServerError(
            f"a generation failed {failures} times; last error: {failure}",
            "see logs/server.log; rollout.retries sets the number of retries",
        )

    def _unavailable(self, lasted: float, failure: str) -> AgentloopError:
        """Return the error of an outage that lasted too long."""
        return ServerError(
            f"the rollout server has been unavailable for {lasted:.0f} s: {failure}",
            "see logs/server.log",
        )

    def _next_pause(self, longest: float) -> float:
        # With jitter: the requests of a batch fail together and must not all return together.
        pause = min(self._pause, longest) * random.uniform(0.75, 1.25)
        self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
        return pause


def retry_after(headers: Mapping[str, str], longest: float) -> float | None:
    """Return the seconds that an overloaded server asks to wait (Retry-After), at most `longest`;
    None if it does not ask.

    The header is a number of seconds or a date.
    """
    value = headers.get("retry-after", "").strip()
    try:
        wanted = float(value)
    except ValueError:
        try:
            wanted = max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except (ValueError, OverflowError):  # missing, or neither
            return None
    return min(wanted, longest) if wanted >= 0 else None
