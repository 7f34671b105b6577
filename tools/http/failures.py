"""`ShownFailures`: say that a service fails in a run that goes on without it."""

from __future__ import annotations

import logging

from agentloop.errors import ToolError

log = logging.getLogger(__name__)


class ShownFailures:
    """Counts the calls that failed and were shown to the model (`on_failure: tell`).

    Such a failure ends no episode: without a line of its own, a run whose service was away from
    beginning to end would look like a run of a model that uses no tool well.

    Args:
        name: the tool's, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls = self._failed = 0
        self._last = ""

    def called(self) -> None:
        """Count a call."""
        self._calls += 1

    def failed(self, error: ToolError) -> None:
        """Count a call that failed for good; the first is logged."""
        self._failed += 1
        self._last = error.message
        if self._failed == 1:
            log.warning(
                "a call of %s failed, and the model reads an error in its place (`on_failure: tell`); how many do is "
                "logged when the run ends. The first: %s",
                self._name, error,
            )  # fmt: skip

    def report(self) -> None:
        """Log how many calls failed, and begin anew."""
        if self._failed:
            log.warning(
                "%d of %d calls of %s failed, and their episodes were scored all the same (`on_failure: tell`); last "
                "error: %s",
                self._failed, self._calls, self._name, self._last,
            )  # fmt: skip
        self._calls = self._failed = 0
