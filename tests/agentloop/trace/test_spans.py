"""`Recorder`: nesting over tasks, ends by exception and cancellation, bounds."""

from __future__ import annotations

import asyncio
import json
import random
import re

import pytest

from agentloop import trace
from agentloop.trace.spans import LONGEST_VALUE, MOST_ATTRIBUTES, Recorder
from agentloop.types import Span, Trajectory


def tree(spans: list[Span]) -> list[tuple[str, str | None]]:
    """(name, name of the parent) of each span."""
    names = {span.span_id: span.name for span in spans}
    return [(span.name, span.parent_id and names[span.parent_id]) for span in spans]


async def test_tasks_started_in_a_span_are_its_children() -> None:
    recorder = Recorder()

    async def work(name: str) -> None:
        with recorder.span(name):
            await asyncio.sleep(0)
            with trace.span(f"{name}.inner"):
                await asyncio.sleep(0)

    with recorder:
        with recorder.span("plan"):
            await asyncio.gather(work("a"), work("b"))
        await work("c")
    spans = recorder.finish()
    assert sorted(tree(spans)) == sorted(
        [
            ("episode", None),
            ("plan", "episode"),
            ("a", "plan"),
            ("b", "plan"),
            ("a.inner", "a"),
            ("b.inner", "b"),
            ("c", "episode"),
            ("c.inner", "c"),
        ]
    )
    assert len({span.span_id for span in spans}) == 8
    assert all(re.fullmatch("[0-9a-f]{16}", span.span_id) for span in spans)
    by_id = {span.span_id: span for span in spans}
    for span in spans:
        assert span.start_ns <= span.end_ns and span.status == "ok"
        if span.parent_id:
            assert by_id[span.parent_id].start_ns <= span.start_ns
            assert span.end_ns <= by_id[span.parent_id].end_ns


async def test_two_episodes_at_once_do_not_mix() -> None:
    async def episode() -> list[Span]:
        recorder = Recorder()
        with recorder:
            for name in ("one", "two"):
                with recorder.span(name):
                    await asyncio.sleep(0)
        return recorder.finish()

    for spans in await asyncio.gather(episode(), episode()):
        assert tree(spans) == [("episode", None), ("one", "episode"), ("two", "episode")]
    outer, inner = Recorder(), Recorder()
    with outer, outer.span("tool"), inner, inner.span("turn"):
        pass
    assert tree(outer.finish()) == [("episode", None), ("tool", "episode")]
    assert tree(inner.finish()) == [("episode", None), ("turn", "episode")]


def test_an_exception_is_an_error_with_a_short_text_and_an_expected_one_is_not() -> None:
    class End(Exception):
        pass

    recorder = Recorder(expected=(End,))
    with pytest.raises(ValueError), recorder.span("wrong"):
        raise ValueError("\ud800" + "x" * 10_000)
    with pytest.raises(End), recorder.span("limit"):
        raise End
    with recorder.span("refused") as span:
        span.fail("no such file")
    _, wrong, limit, refused = recorder.finish()
    assert wrong.status == "error" and wrong.error is not None
    assert wrong.error.startswith("ValueError: ?x") and len(wrong.error) == LONGEST_VALUE
    assert (limit.status, limit.error) == ("ok", None)
    assert (refused.status, refused.error) == ("error", "no such file")


async def test_cancelled_spans_and_spans_left_open_end_as_cancelled() -> None:
    recorder = Recorder()
    left = asyncio.Event()

    async def wait(name: str) -> None:
        with recorder.span(name):
            await left.wait()

    with recorder:
        stopped, behind = asyncio.create_task(wait("stopped")), asyncio.create_task(wait("behind"))
        await asyncio.sleep(0)
        stopped.cancel()
        await asyncio.gather(stopped, return_exceptions=True)
    spans = recorder.finish("the tool broke")
    before = [(span.name, span.status, span.end_ns) for span in spans]
    assert [entry[:2] for entry in before] == [("episode", "error"), ("stopped", "cancelled"), ("behind", "cancelled")]
    assert spans[0].error == "the tool broke"

    # What ends or begins later changes nothing.
    left.set()
    await behind
    with recorder.span("late") as late:
        late.set(a=1)
    assert [(span.name, span.status, span.end_ns) for span in spans] == before
    assert recorder.finish() == []


def test_spans_beyond_the_limit_are_counted() -> None:
    recorder = Recorder(limit=3)
    with recorder, recorder.span("a"):
        for _ in range(5):
            with recorder.span("b"), recorder.span("c") as deep:
                deep.set(x=1)
                deep.fail("no")
    spans = recorder.finish()
    assert tree(spans) == [("episode", None), ("a", "episode"), ("b", "a")]
    assert spans[0].attributes == {"dropped_spans": 9}


def test_attributes_are_what_every_receiver_takes() -> None:
    recorder = Recorder()
    with recorder.span("plan", depth=2, name="n", start_ns="s", ok=True) as span:
        span.set(
            big=2**70, nan=float("nan"), half=0.5, none=None, items=[1, "a"], long="y" * 5000, bad="\ud800", depth=3
        )
        span.set(**{f"k{i}": i for i in range(100)})
    with recorder.span("n" * 5000):
        pass
    _, first, second = recorder.finish()
    kept = first.attributes
    assert kept["depth"] == 3 and kept["name"] == "n" and kept["start_ns"] == "s" and kept["ok"] is True
    assert kept["big"] == str(2**70) and kept["nan"] == "nan" and kept["half"] == 0.5 and kept["none"] == "None"
    assert kept["items"] == "[1, 'a']" and len(str(kept["long"])) == LONGEST_VALUE and kept["bad"] == "?"
    assert len(kept) == MOST_ATTRIBUTES and len(second.name) == LONGEST_VALUE

    trajectory = Trajectory([], [], [], [], 0, trace_id=recorder.trace_id, spans=[first, second])
    again = Trajectory.from_json(json.loads(json.dumps(trajectory.to_json())))
    assert again == trajectory and again.spans[0].attributes == kept


def test_names_of_attributes_are_bounded_and_can_be_sent() -> None:
    recorder = Recorder()
    with recorder.span("plan", **{"half \ud800": 1}) as span:  # keys that a model wrote, for instance
        span.set(**{"k" * 4_000_000: 2})
    assert list(recorder.finish()[1].attributes) == ["half ?", "k" * (LONGEST_VALUE - 1) + "…"]


def test_a_value_that_cannot_be_shown_does_not_end_the_episode() -> None:
    class Bad:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    recorder = Recorder()
    with recorder.span("a", bad=Bad()):  # type: ignore[arg-type]  # what a careless agent may give
        pass
    assert recorder.finish()[1].attributes["bad"] == "(a Bad that has no text)"


async def test_the_traceparent_names_the_open_span() -> None:
    assert trace.traceparent() is None and trace.trace_headers() == {}
    with trace.span("nothing runs") as nothing:
        nothing.set(a=1)
        nothing.fail("x")
    recorder = Recorder()
    with recorder, recorder.span("tool"):
        inside = trace.traceparent()
        assert await asyncio.to_thread(trace.trace_headers) == {"traceparent": inside}
    span = recorder.finish()[1]
    assert inside == f"00-{recorder.trace_id}-{span.span_id}-01"
    assert trace.traceparent() is None


def test_ids_do_not_touch_the_random_numbers_of_agents() -> None:
    random.seed(1)
    expected = random.random()
    random.seed(1)
    first, second = Recorder(), Recorder()
    assert random.random() == expected and first.trace_id != second.trace_id
