"""An episode as calls of weave: one call for each span, with the texts that it stands for.

Texts are those of the conversation: nothing is decoded again, and no call holds token ids.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from agentloop.images import IMAGE_KEYS
from agentloop.trace.exporting import TracedEpisode
from agentloop.trace.genai import Generation, SpanSubjects, generations
from agentloop.types import Message, Span

NAMESPACE = uuid.UUID("6c8f2f3e-5d0b-4e6e-9a43-0d7f5b0a1c52")
"""Of the ids of calls: they follow from trace and span, so that a call sent twice stays one."""

OPS = ("episode", "turn", "generate", "parse", "tool", "interaction", "reward")
"""Spans of the library; the ops of weave have their names."""

LEFT_OUT = ("parse",)
"""Spans of microseconds, which are no calls of weave unless they failed."""

LONGEST_NAME = 100


@dataclass(slots=True)
class EpisodeCall:
    """One call of an episode.

    Attributes:
        op: name of the op: letters, digits, `_`, `-` and `.`.
        id: a UUID; of the first call, the trace's own.
        error: class and text of an exception, or None.
        usage: tokens of prompt and answer, of a generation.
        plain: whether inputs and output are JSON: they hold no image.
    """

    op: str
    name: str
    id: str
    parent: str | None
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    inputs: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    error: tuple[str, str] | None = None
    usage: tuple[int, int] | None = None
    plain: bool = True


def calls_of(episode: TracedEpisode, *, texts: bool, image: Callable[[Any], Any]) -> list[EpisodeCall]:
    """Return the calls of an episode, each after its parent.

    Args:
        texts: with prompts, answers, arguments and results.
        image: turns an image of a message into what the call holds.
    """
    view = _View(episode, texts, image)
    common: dict[str, Any] = _value({**episode.attributes(), "key": episode.key})
    found: dict[str, EpisodeCall] = {}
    for span in episode.spans:
        if span.name in LEFT_OUT and span.status == "ok":
            continue
        call = EpisodeCall(
            op=_op(span.name),
            name=_plain(span.name)[:LONGEST_NAME],
            id=str(_id(episode.trace_id, span)),
            parent=found[span.parent_id].id if span.parent_id in found else _first(found),
            start_ns=span.start_ns,
            end_ns=max(span.start_ns, span.end_ns),
            attributes={**_value(span.attributes), **common},
            error=_error(span),
        )
        view.fill(call, span)
        found[span.span_id] = call
    return list(found.values())


class _View:
    """What the spans of an episode refer to."""

    def __init__(self, episode: TracedEpisode, texts: bool, image: Callable[[Any], Any]) -> None:
        self._episode = episode
        self._texts = texts
        self._image = image
        self._subjects = SpanSubjects(episode)
        self._exchanges = _exchanges(episode.main.trajectory.messages)
        self._plain = True  # of the call that is being filled
        self._fill = {
            "episode": self._episode_call, "turn": self._turn, "generate": self._generate, "parse": self._parse,
            "tool": self._tool, "interaction": self._interaction, "reward": self._reward,
        }  # fmt: skip

    def fill(self, call: EpisodeCall, span: Span) -> None:
        """Set inputs, output and name of a call, and whether it is plain."""
        self._plain = True
        if call.op in self._fill:
            self._fill[call.op](call, span)
        call.plain = self._plain

    def _episode_call(self, call: EpisodeCall, span: Span) -> None:
        trajectory = self._episode.main.trajectory
        call.name = _plain(f"{trajectory.agent_name} {self._episode.key}")[:LONGEST_NAME]
        call.attributes["sampled_tokens"] = sum(r.trajectory.sampled_tokens for r in self._episode.records)
        call.inputs = {"task_id": _value(trajectory.task_id)}
        call.output = {
            "reward": _value(trajectory.reward),
            "reward_parts": _value(trajectory.reward_parts),
            "stop_reason": trajectory.stop_reason.value,
            "status": trajectory.status.value,
            "turns": sum(len(record.trajectory.turns) for record in self._episode.records),
        }
        if trajectory.error:
            call.output["error"] = _plain(trajectory.error)
            call.error = call.error or ("EpisodeFailed", _plain(trajectory.error))
        if not self._texts:
            return
        found = list(generations(trajectory))
        call.inputs["messages"] = self._messages(found[0].before if found else trajectory.messages)
        call.output["answer"] = trajectory.answer if trajectory.answer is None else _plain(trajectory.answer)
        if found:
            call.output["message"] = self._answer(found[-1])

    def _turn(self, call: EpisodeCall, span: Span) -> None:
        generation = self._subjects.generation(span)
        if generation is not None:
            call.output = {"stop_reason": generation.turn.stop_reason.value}

    def _generate(self, call: EpisodeCall, span: Span) -> None:
        generation = self._subjects.generation(span)
        if generation is None:
            return
        turn = generation.turn
        call.usage = (turn.start, turn.end - turn.start)
        call.output = {"stop_reason": turn.stop_reason.value}
        if self._texts:
            call.inputs = {"messages": self._messages(generation.before)}
            call.output = {**self._answer(generation), **call.output}

    def _parse(self, call: EpisodeCall, span: Span) -> None:
        call.output = {name: call.attributes[name] for name in _value(span.attributes)}

    def _tool(self, call: EpisodeCall, span: Span) -> None:
        name, call_id = str(span.attributes.get("tool", "")), str(span.attributes.get("call_id", ""))
        call.name = f"tool {_plain(name)}"[:LONGEST_NAME]
        call.inputs = {"tool": _plain(name)}
        asked, result = self._subjects.calls.get(call_id), self._subjects.results.get(call_id)
        if self._texts and asked is not None:
            call.inputs["arguments"] = _value(asked.arguments)
        if self._texts and result is not None:
            call.output = {"result": self._content(result)}
        if "score" in span.attributes:
            call.output = {**(call.output or {}), "reward": call.attributes["score"]}

    def _interaction(self, call: EpisodeCall, span: Span) -> None:
        name = str(span.attributes.get("interaction", ""))
        call.name = f"interaction {_plain(name)}"[:LONGEST_NAME]
        call.inputs = {"interaction": _plain(name)}
        call.output = {"reward": call.attributes["score"]} if "score" in span.attributes else {}
        said, answered = next(self._exchanges, (None, None))
        if self._texts and said is not None:
            call.inputs["message"] = self._content(said)
        if self._texts and answered is not None:
            call.output["message"] = self._content(answered)

    def _reward(self, call: EpisodeCall, span: Span) -> None:
        trajectory, name = self._episode.main.trajectory, str(span.attributes.get("reward", ""))
        call.name = f"reward {_plain(name)}"[:LONGEST_NAME] if name not in ("", "reward") else "reward"
        call.inputs = {"reward": _plain(name)}
        call.output = {"score": call.attributes.get("score")}
        if name == "reward":
            call.output["parts"] = _value(trajectory.reward_parts)
            if self._texts and trajectory.answer is not None:
                call.inputs["answer"] = _plain(trajectory.answer)

    def _messages(self, messages: Any) -> list[dict[str, Any]]:
        return [self._message(message) for message in messages]

    def _message(self, message: Message) -> dict[str, Any]:
        shown: dict[str, Any] = {"role": message["role"], "content": self._content(message)}
        for key in ("reasoning_content", "name", "tool_call_id"):
            if message.get(key):
                shown[key] = _plain(message[key])
        if message.get("tool_calls"):
            shown["tool_calls"] = [_tool_call(call.get("id", ""), call["function"]) for call in message["tool_calls"]]
        return shown

    def _answer(self, generation: Generation) -> dict[str, Any]:
        turn = generation.turn
        if generation.answer is not None:
            answer = self._message(generation.answer)
        else:
            answer = {"role": "assistant", "content": _plain(turn.text)}
            if turn.tool_calls:
                answer["tool_calls"] = [
                    _tool_call(call.id, {"name": call.name, "arguments": call.arguments}) for call in turn.tool_calls
                ]
        if turn.malformed_calls:
            answer["malformed_calls"] = [
                {"text": _plain(call.text), "reason": _plain(call.reason)} for call in turn.malformed_calls
            ]
        return answer

    def _content(self, message: Message) -> Any:
        content = message["content"]
        if isinstance(content, str):
            return _plain(content)
        parts = [self._part(part) for part in content]
        return "".join(parts) if all(isinstance(part, str) for part in parts) else parts

    def _part(self, part: Mapping[str, Any]) -> Any:
        if part.get("type") == "text":
            return _plain(str(part.get("text", "")))
        value = next((part[key] for key in IMAGE_KEYS if key in part), None)
        shown = None if value is None else self._image(value)
        if shown is None:
            return "[image]"
        self._plain = False
        return {"type": "image", "image": shown}


def _exchanges(messages: list[Message]) -> Any:
    """Yield (what the model said, what it was told) for each message of a user after the first
    answer; last, what it said at the end."""
    said: Message | None = None
    for message in messages:
        if message["role"] == "assistant":
            said = message
        elif message["role"] == "user" and said is not None:
            yield said, message
            said = None
    if said is not None:
        yield said, None


def _tool_call(call_id: str, function: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": _plain(call_id),
        "type": "function",
        "function": {"name": _plain(str(function["name"])), "arguments": _value(function["arguments"])},
    }


def _id(trace_id: str, span: Span) -> uuid.UUID:
    # weave finds a whole trace by the id of its first call.
    return uuid.UUID(trace_id) if span.parent_id is None else uuid.uuid5(NAMESPACE, trace_id + span.span_id)


def _first(found: Mapping[str, EpisodeCall]) -> str | None:
    """Return the parent of a call whose own is not known: the first call."""
    return next((call.id for call in found.values()), None)


def _op(name: str) -> str:
    return name if name in OPS else re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")[:LONGEST_NAME] or "span"


def _error(span: Span) -> tuple[str, str] | None:
    """Return class and text of the error that ended a span. weave has no state for a cancelled
    call."""
    if span.status == "ok":
        return None
    if span.status == "cancelled":
        return "Cancelled", _plain(span.error or "the call was cancelled")
    name, separator, text = (span.error or "").partition(": ")
    if separator and name.isidentifier():
        return name, _plain(text)
    return "Error", _plain(span.error or "the call failed")


def _value(value: Any) -> Any:
    """Return a JSON value that can be sent: a NaN or an infinity, which JSON has not, is text."""
    if isinstance(value, str):
        return _plain(value)
    if isinstance(value, float):
        return value if value - value == 0.0 else str(value)
    if isinstance(value, dict):
        return {_plain(str(key)): _value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_value(item) for item in value]
    return value if value is None or isinstance(value, bool | int) else _plain(str(value))


def _plain(text: str) -> str:
    """Return a text without lone surrogates, which UTF-8 cannot hold."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
