"""Spans: how long the parts of an episode took, and which part ran inside which.

An episode has one `Recorder`. The span that is open in the running task is kept in a context
variable, which tasks inherit: parallel tool calls, and the branches of a fork that run in tasks of
their own, are children of the span in which they were started. Spans hold times and ids; texts are
in the trajectory.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextvars import ContextVar
from types import TracebackType
from typing import Any

from agentloop.types import AttributeValue, Span
from agentloop.wire import TRACEPARENT_HEADER

MOST_SPANS = 2_000
"""Spans that an episode keeps; further ones are counted in the attribute `dropped_spans` of its
first."""

MOST_ATTRIBUTES = 64
LONGEST_VALUE = 2_000
"""Attributes of a span that are kept; and characters of names, attributes and errors."""

TRACEPARENT_VARIABLE = "TRACEPARENT"
"""The environment variable that carries it into a process, by OpenTelemetry's convention."""


class OpenSpan:
    """A span that is running, as `with` gives it: `with episode.span("plan") as span:`."""

    __slots__ = ("_before", "_recorder", "_span", "id")

    def __init__(self, recorder: Recorder, span: Span | None, parent_id: str) -> None:
        self._recorder = recorder
        self._span = span  # None: over the limit
        self._before: OpenSpan | None = None
        self.id = parent_id if span is None else span.span_id

    @property
    def recorder(self) -> Recorder:
        """The recorder of the episode."""
        return self._recorder

    def set(self, **attributes: AttributeValue) -> None:
        """Add attributes: text, numbers or booleans; anything else is kept as text."""
        if self._span is not None and not self._span.end_ns:
            add_attributes(self._span, attributes)

    def fail(self, error: str) -> None:
        """Mark the span as an error with a short text, without raising."""
        if self._span is not None and not self._span.end_ns:
            self._span.status, self._span.error = "error", _text(error)

    def __enter__(self) -> OpenSpan:
        self._before = _current.get()
        _current.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Not a token: an agent may close a span in another context than it opened it in.
        _current.set(self._before)
        self._before = None
        span = self._span
        if span is None or span.end_ns:
            return
        span.end_ns = self._recorder.now()
        if error is None:
            return
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            span.status = "cancelled"
        elif not isinstance(error, self._recorder.expected):
            span.status, span.error = "error", _text(f"{type(error).__name__}: {_text(error)}")


_current: ContextVar[OpenSpan | None] = ContextVar("agentloop_span", default=None)


def current_episode() -> Recorder | None:
    """Return the recorder of the episode that the running task belongs to, which stands for it."""
    running = _current.get()
    return running.recorder if running is not None else None


class Recorder:
    """The spans of one episode. The first, `episode`, is open from here to `finish`.

    Args:
        limit: spans that are kept.
        expected: exceptions that end a span without being an error.

    Attributes:
        trace_id: of the episode; 32 hexadecimal digits.
    """

    __slots__ = ("_base", "_dropped", "_limit", "_number", "_offset_ns", "_root", "_spans", "expected", "trace_id")

    def __init__(self, *, limit: int = MOST_SPANS, expected: tuple[type[BaseException], ...] = ()) -> None:
        # Not from `random`: the agents' own random numbers stay what they are without spans.
        self.trace_id = os.urandom(16).hex()
        self.expected = expected
        self._base = int.from_bytes(os.urandom(8)) | 1
        self._number = 0
        self._limit = limit
        self._dropped = 0
        # Durations come from a clock that is never set back.
        self._offset_ns = time.time_ns() - time.perf_counter_ns()
        self._spans: list[Span] | None = []
        self._root = OpenSpan(self, self._add("episode", None, self.now()), "")

    def now(self) -> int:
        """Return the time in nanoseconds since 1970."""
        return time.perf_counter_ns() + self._offset_ns

    def span(self, name: str, start_ns: int | None = None, /, **attributes: AttributeValue) -> OpenSpan:
        """Return a span to be opened by `with`, inside the one that is open in this task.

        Args:
            start_ns: when it began, if that was before this call.
        """
        parent = _current.get()
        parent_id = parent.id if parent is not None and parent.recorder is self else self._root.id
        spans = self._spans
        if spans is None:  # the episode is over
            return OpenSpan(self, None, parent_id)
        if len(spans) >= self._limit:
            self._dropped += 1
            return OpenSpan(self, None, parent_id)
        span = self._add(_text(name), parent_id, start_ns or self.now())
        if attributes:
            add_attributes(span, attributes)
        return OpenSpan(self, span, parent_id)

    def __enter__(self) -> Recorder:
        """Make `episode` the span that is open in this task."""
        self._root.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._root.__exit__(kind, error, trace)

    def finish(self, error: str | None = None) -> list[Span]:
        """End the episode and return its spans in the order of their start, `episode` first.

        Spans that are still open, as of a task that an agent left behind, end as cancelled.

        Args:
            error: why the episode cannot be trained; None: it can.
        """
        spans = self._spans or []
        self._spans = None
        if not spans:
            return []
        root, end = spans[0], self.now()
        root.status, root.error = ("ok", None) if error is None else ("error", _text(error))
        root.end_ns = end
        if self._dropped:
            root.attributes["dropped_spans"] = self._dropped
        for span in spans:
            if not span.end_ns:
                span.end_ns, span.status = end, "cancelled"
        return spans

    def _add(self, name: str, parent_id: str | None, start_ns: int) -> Span:
        span = Span(name, f"{(self._base + self._number) & 0xFFFFFFFFFFFFFFFF or 1:016x}", parent_id, start_ns, 0)
        self._number += 2  # ids stay odd: none is zero, which is invalid
        assert self._spans is not None
        self._spans.append(span)
        return span


class _Unrecorded:
    """Stands for a span where no episode is running."""

    __slots__ = ()

    def set(self, **attributes: AttributeValue) -> None:
        pass

    def fail(self, error: str) -> None:
        pass

    def __enter__(self) -> _Unrecorded:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


_UNRECORDED = _Unrecorded()


def span(name: str, /, **attributes: AttributeValue) -> OpenSpan | _Unrecorded:
    """Return a span of the episode that runs here, as in `with span("query", table="orders"):`.

    For tools, rewards and interactions; an agent has `episode.span`. Outside an episode, for
    instance in a tool's own test, it records nothing.
    """
    current = _current.get()
    return _UNRECORDED if current is None else current.recorder.span(name, None, **attributes)


def current_traceparent() -> str | None:
    """Return the W3C `traceparent` of the span that is open here; None outside an episode.

    In a process of its own (`run_in: process`) it is that of the call.
    """
    current = _current.get()
    if current is None:
        return os.environ.get(TRACEPARENT_VARIABLE) or None
    return f"00-{current.recorder.trace_id}-{current.id}-01"


def trace_headers() -> dict[str, str]:
    """Return the headers that connect an HTTP request with the span that is open here.

    Empty outside an episode. For tools: `httpx.post(url, headers=trace_headers(), ...)`.
    """
    value = current_traceparent()
    return {} if value is None else {TRACEPARENT_HEADER: value}


def add_attributes(span: Span, attributes: dict[str, Any]) -> None:
    """Add attributes to a span; at most `MOST_ATTRIBUTES` are kept."""
    kept = span.attributes
    for name, value in attributes.items():
        key = _text(name)
        if len(kept) >= MOST_ATTRIBUTES and key not in kept:
            return
        kept[key] = _value(value)


def _value(value: Any) -> AttributeValue:
    """Return a value that JSON holds and every receiver of spans accepts."""
    kind = type(value)
    if kind is str:
        return _text(value)
    if kind is bool:
        return bool(value)
    if kind is int and -(2**63) <= value < 2**63:
        return int(value)
    if kind is float and value - value == 0.0:  # finite
        return float(value)
    return _text(value)


def _text(value: object) -> str:
    """Return a short text without lone surrogates, which cannot be encoded."""
    if type(value) is str:
        text = value
    else:
        try:
            text = str(value)
        except Exception:  # noqa: BLE001  # a user's own `__str__`; a span never ends an episode
            text = f"(a {type(value).__name__} that has no text)"
    if len(text) > LONGEST_VALUE:
        text = text[: LONGEST_VALUE - 1] + "…"
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
