"""Spans of an episode under the names of OpenTelemetry's GenAI conventions, with their texts.

`episode` is `invoke_agent`, `generate` is `chat`, `tool` is `execute_tool`; other spans keep their
names. A generation has the messages that came since the one before, not the whole conversation
again: the spans of an episode together hold each message once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from agentloop.trace.exporting import TracedEpisode
from agentloop.types import Message, Span, ToolCall, Trajectory, Turn

Attributes = dict[str, Any]
"""Text, numbers, booleans, or lists of text, by name."""

LONGEST_PART = 20_000
"""Characters of one message or result that are sent."""

MOST_MESSAGES = 50
"""Messages of one span; of more, the last ones are sent."""

PROVIDER = "agentloop"


@dataclass(slots=True)
class NamedSpan:
    """A span and what a receiver shows of it.

    Attributes:
        own: attributes of this span.
        common: those of all spans of its episode: one and the same object. Their names are not in
            `own`.
    """

    span: Span
    name: str
    kind: Literal["internal", "client"] = "internal"
    own: Attributes = field(default_factory=dict)
    common: Attributes = field(default_factory=dict)


def named_spans(episode: TracedEpisode, *, texts: bool = True) -> list[NamedSpan]:
    """Return the spans of an episode in the order of their start, `invoke_agent` first.

    Args:
        texts: add prompts, answers, arguments and results.
    """
    common = episode.attributes()
    view = _View(episode, texts)
    found = []
    for span in episode.spans:
        named = view.named(span)
        own = _own(span)
        if not common.keys().isdisjoint(own):
            own = {key: value for key, value in own.items() if key not in common}
        named.own = own | named.own
        named.common = common
        if span.status == "error":
            named.own["error.type"] = _error_type(span.error)
        found.append(named)
    return found


def _own(span: Span) -> Attributes:
    """Return a span's attributes under names that mean one thing and hold one type in all spans."""
    if span.name == "tool":  # they are there as gen_ai.tool.name and gen_ai.tool.call.id
        return {key: value for key, value in span.attributes.items() if key not in ("tool", "call_id")}
    if span.name == "reward":
        return {"reward_name" if key == "reward" else key: value for key, value in span.attributes.items()}
    return dict(span.attributes)


@dataclass(slots=True)
class Generation:
    """One turn, its trajectory, and the messages before and after it."""

    turn: Turn
    before: Sequence[Message]
    answer: Message | None


class SpanSubjects:
    """What the spans of an episode refer to.

    Attributes:
        calls: tool calls of the policy, by id.
        results: messages that answer them, by id of the call.
    """

    def __init__(self, episode: TracedEpisode) -> None:
        self._generations: dict[str, Generation] = {}
        self.calls: dict[str, ToolCall] = {}
        self.results: dict[str, Message] = {}
        for record in episode.records:
            for generation in generations(record.trajectory):
                self._generations[generation.turn.request_id] = generation
                self.calls |= {call.id: call for call in generation.turn.tool_calls}
            for message in record.trajectory.messages:
                if message.get("tool_call_id"):
                    self.results[message["tool_call_id"]] = message

    def generation(self, span: Span) -> Generation | None:
        """Return the generation that a span `turn` or `generate` is about."""
        return self._generations.get(str(span.attributes.get("request_id", "")))


class _View:
    """Names and describes the spans of an episode."""

    def __init__(self, episode: TracedEpisode, texts: bool) -> None:
        self._episode = episode
        self._texts = texts
        self._subjects = SpanSubjects(episode)

    def named(self, span: Span) -> NamedSpan:
        if span.name == "episode" and span.parent_id is None:
            return self._agent(span)
        if span.name == "generate":
            return self._chat(span)
        if span.name == "tool":
            return self._tool(span)
        return NamedSpan(span, span.name)

    def _agent(self, span: Span) -> NamedSpan:
        trajectory = self._episode.main.trajectory
        attributes: Attributes = {
            "gen_ai.operation.name": "invoke_agent",
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.agent.name": trajectory.agent_name,
            "gen_ai.conversation.id": self._episode.key,
            "stop_reason": trajectory.stop_reason.value,
            "turns": sum(len(record.trajectory.turns) for record in self._episode.records),
            "sampled_tokens": sum(record.trajectory.sampled_tokens for record in self._episode.records),
        }
        if self._episode.run.model:
            attributes["gen_ai.request.model"] = self._episode.run.model
        if trajectory.data_source:
            attributes["data_source"] = trajectory.data_source
        if trajectory.reward is not None:
            attributes["reward"] = float(trajectory.reward)
        attributes |= {f"reward_parts.{name}": float(value) for name, value in trajectory.reward_parts.items()}
        if self._texts:
            found = list(generations(trajectory))
            if trajectory.answer is not None:
                attributes["answer"] = _text(trajectory.answer)
            if found:
                attributes["gen_ai.input.messages"] = _messages(found[0].before)
                attributes["gen_ai.output.messages"] = _answer(found[-1])
        return NamedSpan(span, f"invoke_agent {trajectory.agent_name}", own=attributes)

    def _chat(self, span: Span) -> NamedSpan:
        model = self._episode.run.model
        attributes: Attributes = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": PROVIDER}
        if model:
            attributes["gen_ai.request.model"] = model
        generation = self._subjects.generation(span)
        if generation is not None:
            turn = generation.turn
            attributes |= {
                "gen_ai.response.id": turn.request_id,
                "gen_ai.response.finish_reasons": [_finish_reason(turn)],
                "gen_ai.usage.input_tokens": turn.start,
                "gen_ai.usage.output_tokens": turn.end - turn.start,
                "gen_ai.usage.cache_read.input_tokens": turn.cached_tokens,
            }
            if self._texts:
                attributes["gen_ai.input.messages"] = _messages(generation.before)
                attributes["gen_ai.output.messages"] = _answer(generation)
        return NamedSpan(span, f"chat {model}".rstrip(), "client", attributes)

    def _tool(self, span: Span) -> NamedSpan:
        name, call_id = str(span.attributes.get("tool", "")), str(span.attributes.get("call_id", ""))
        attributes: Attributes = {
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": name,
            "gen_ai.tool.type": "function",
            "gen_ai.tool.call.id": call_id,
        }
        call, result = self._subjects.calls.get(call_id), self._subjects.results.get(call_id)
        if self._texts and call is not None:
            attributes["gen_ai.tool.call.arguments"] = _text(_json(call.arguments))
        if self._texts and result is not None:
            attributes["gen_ai.tool.call.result"] = _text(_content(result))
        return NamedSpan(span, f"execute_tool {name}".rstrip(), own=attributes)


def generations(trajectory: Trajectory) -> Iterator[Generation]:
    """Yield the turns of a trajectory with the messages around them.

    The last assistant messages are those of its turns: only copied ones of a fork come before.
    """
    turns, messages = trajectory.turns, trajectory.messages
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"][-len(turns) :]
    if not turns or len(places) != len(turns):
        yield from (Generation(turn, (), None) for turn in turns)
        return
    begin = 0
    for turn, place in zip(turns, places, strict=True):
        yield Generation(turn, messages[begin:place], messages[place])
        begin = place + 1


def _finish_reason(turn: Turn) -> str:
    return "tool_call" if turn.tool_calls and turn.stop_reason == "stop" else turn.stop_reason.value


def _answer(generation: Generation) -> str:
    turn = generation.turn
    message = generation.answer or {"role": "assistant", "content": turn.text}
    return _json([{**_message(message), "finish_reason": _finish_reason(turn)}])


def _messages(messages: Sequence[Message]) -> str:
    return _json([_message(message) for message in messages[-MOST_MESSAGES:]])


def _message(message: Message) -> dict[str, Any]:
    """Return a message in the form of `gen_ai.input.messages`."""
    parts: list[dict[str, Any]] = []
    if message.get("reasoning_content"):
        parts.append({"type": "reasoning", "content": _text(message["reasoning_content"])})
    text = _text(_content(message))
    if message["role"] == "tool":
        parts.append({"type": "tool_call_response", "id": message.get("tool_call_id"), "response": text})
    elif text:
        parts.append({"type": "text", "content": text})
    for call in message.get("tool_calls") or ():
        function = call["function"]
        parts.append(
            {
                "type": "tool_call",
                "id": call.get("id"),
                "name": function["name"],
                "arguments": _bounded_arguments(function["arguments"]),
            }
        )
    return {"role": message["role"], "parts": parts}


def _bounded_arguments(arguments: Any) -> Any:
    text = _json(arguments)
    return arguments if len(text) <= LONGEST_PART else _text(text)


def _content(message: Message) -> str:
    """Return the text of a message; an image is `[image]`."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(str(part["text"]) if part.get("type") == "text" else "[image]" for part in content)


def _text(text: str) -> str:
    if len(text) > LONGEST_PART:
        text = f"{text[:LONGEST_PART]}\n[cut: {len(text):,} characters; all are in the run's traces]"
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


_ENCODER = json.JSONEncoder(ensure_ascii=False, default=str)
"""Made once: it takes as long to make as to use."""


def _json(value: Any) -> str:
    text = _ENCODER.encode(value)
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _error_type(error: str | None) -> str:
    """Return the class in `Type: text`, or `error`."""
    name = (error or "").partition(":")[0]
    return name if name.isidentifier() else "error"
