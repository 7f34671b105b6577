"""Episodes on their way to a sender process: what is read says what was written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from agentloop.errors import ConfigError, ExportError
from agentloop.trace.exporting import ExportRun, TracedEpisode
from agentloop.trace.genai import named_spans
from agentloop.trace.record import TraceRecord
from agentloop.trace.sender import serving
from agentloop.trace.sender.wire import line, packed, read_line, unpacked
from agentloop.trace.weave.calls import calls_of
from agentloop.types import MalformedCall
from tests.agentloop.trace.made_episodes import record

RUN = ExportRun("demo", Path("run"), "models/small", rollout_n=2)


def there(episode: TracedEpisode) -> TracedEpisode:
    return unpacked(RUN, read_line(line(packed(episode, lambda _: None))))


def strange() -> TraceRecord:
    made = record(7, "g/1", text="語 \ud800 <script>")
    made.trajectory.reward_parts["ratio"] = -math.inf
    made.trajectory.turns[1].malformed_calls.append(MalformedCall("<call>", "no JSON"))
    made.trajectory.messages[1]["content"] = [{"type": "image", "image": b"x"}, {"type": "text", "text": "how many?"}]
    made.trajectory.spans[2].status, made.trajectory.spans[2].error = "error", "ValueError: \ud800"
    made.trajectory.turns[0].tool_calls[0].arguments["much"] = 2**70
    return made


@pytest.mark.parametrize("made", [record(), strange(), record(split="eval")], ids=["plain", "strange", "eval"])
def test_senders_make_the_same_of_an_episode_there_as_here(made: TraceRecord) -> None:
    episode = TracedEpisode(RUN, (made,))
    arrived = there(episode)
    assert named_spans(arrived) == named_spans(episode)
    assert calls_of(arrived, texts=True, image=lambda _: None) == calls_of(episode, texts=True, image=lambda _: None)


def test_a_fork_and_an_episode_without_a_trace_id_keep_what_names_them() -> None:
    first, second = record(3), record(3)
    first.parts = second.parts = 2
    second.part = 1
    second.trajectory.trace_id = ""
    episode = TracedEpisode(RUN, (first, second))
    arrived = there(episode)
    assert (arrived.trace_id, arrived.key, len(arrived.records)) == (episode.trace_id, episode.key, 2)
    assert named_spans(arrived) == named_spans(episode)


def test_a_line_has_no_columns_of_tokens() -> None:
    made = record()
    made.trajectory.token_ids = [123_456] * 20
    assert b"123456" not in line(packed(TracedEpisode(RUN, (made,)), lambda _: None))


class _Sender:
    def __init__(self, error: Exception | None) -> None:
        self._error = error

    def send(self, episodes: Any, images: Any) -> None:
        if self._error is not None:
            raise self._error


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (None, {}),
        (ExportError("gone", "start it"), {"error": "gone", "hint": "start it", "final": False, "config": False}),
        (ExportError("no", final=True), {"error": "no", "hint": None, "final": True, "config": False}),
        (ConfigError("no key", "set it"), {"error": "no key", "hint": "set it", "final": False, "config": True}),
        # One episode that cannot be converted is left out; the process goes on.
        (KeyError("role"), {"error": "KeyError: 'role'", "hint": None, "final": True, "config": False}),
    ],
)
def test_each_failure_is_an_answer(error: Exception | None, answer: dict[str, Any]) -> None:
    request = {"episodes": [packed(TracedEpisode(RUN, (record(),)), lambda _: None)], "images": {}}
    assert serving._answer(_Sender(error), RUN, read_line(line(request))) == answer
