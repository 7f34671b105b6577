"""An episode as a conversation: its messages, and what is known of each sampled turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

import numpy as np

from agentloop.text import finite
from agentloop.trace.index.rows import seconds_of
from agentloop.trace.record import RecordKey, TraceRecord
from agentloop.types import Message, Span, Trajectory, Turn
from agentloop.viewer.api.decoder import Decoder

LONGEST_PROMPT_TEXT = 400_000
"""Characters of the decoded prompt in an answer."""


class Columns:
    """The token columns of a trajectory as arrays (L), L being the number of ids. Columns of a
    rejected trajectory may be shorter or longer; they are filled up or cut.

    Attributes:
        mask: booleans, which tokens were sampled.
        logprobs: of the engine, NaN where there is none.
        trainer_logprobs, advantages: None: the trace has none.
    """

    def __init__(self, record: TraceRecord) -> None:
        t = record.trajectory
        self.record = record
        n = len(t.token_ids)
        self.mask = _fitted(np.array([value == 1 for value in t.loss_mask], dtype=bool), n, False)
        numbers = [np.nan if value is None else value for value in t.logprobs]
        self.logprobs = _fitted(np.array(numbers, dtype=np.float64), n, np.nan)
        self.versions = list(t.versions)[:n] + [None] * (n - len(t.versions))
        self.trainer_logprobs = _fitted(record.trainer_logprobs, n, np.nan)
        self.advantages = _fitted(record.advantages, n, 0.0)

    def mask_runs(self) -> list[list[int]]:
        """Return `[start, end]` of each run of sampled tokens."""
        edges = np.flatnonzero(np.diff(np.concatenate(([0], self.mask.astype(np.int8), [0]))))
        return [[int(start), int(end)] for start, end in zip(edges[::2], edges[1::2], strict=True)]

    def version_runs(self) -> list[dict[str, int | None]]:
        """Return the policy versions of the sampled tokens, as runs `{start, end, version}`."""
        runs: list[dict[str, int | None]] = []
        for start, end in self.mask_runs():
            begin = start
            for version, same in groupby(self.versions[start:end]):
                after = begin + len(list(same))
                runs.append({"start": begin, "end": after, "version": version})
                begin = after
        return runs

    def mismatch(self, start: int, end: int) -> float | None:
        """Return the mean absolute difference of engine and trainer logprobs of some tokens."""
        if self.trainer_logprobs is None:
            return None
        return _mean(np.abs(self.logprobs[start:end] - self.trainer_logprobs[start:end]))

    def advantage(self, start: int, end: int) -> float | None:
        """Return the mean advantage of the sampled tokens among some; None: not trained."""
        if self.advantages is None:
            return None
        return _mean(self.advantages[start:end][self.mask[start:end]].astype(np.float64))


def episode_json(record: TraceRecord, decoder: Decoder | None) -> dict[str, Any]:
    """Return everything about a trajectory but its tokens."""
    t = record.trajectory
    split, step, group, sample, _ = RecordKey.parse(record.key)
    columns = Columns(record)
    versions = columns.version_runs()
    oldest = min((run["version"] for run in versions if run["version"] is not None), default=None)
    return {
        "key": record.key,
        "step": record.step,
        "split": record.split,
        "version": record.version,
        "part": record.part,
        "row": record.row,
        "trace_id": t.trace_id or None,
        "group_id": t.group_id,
        "sample_index": t.sample_index,
        "task_id": t.task_id,
        "agent_name": t.agent_name,
        "data_source": t.data_source,
        "status": str(t.status),
        "stop_reason": str(t.stop_reason),
        "reward": finite(t.reward),
        "outcome": finite(t.outcome),
        "parts": {name: finite(value) for name, value in t.reward_parts.items()},
        "step_rewards": [asdict(reward) for reward in t.step_rewards],
        "answer": t.answer,
        "error": t.error,
        "broken_rule": t.broken_rule,
        "turns": len(t.turns),
        "tool_calls": sum(len(turn.tool_calls) for turn in t.turns),
        "latency_s": seconds_of({name: value for name, value in t.metrics.items() if finite(value) is not None}),
        "started": min((span.start_ns for span in t.spans), default=0) / 1e9 or None,
        "advantage": columns.advantage(0, len(t.token_ids)),
        "faults": [asdict(fault) for fault in t.faults],
        "metrics": {name: finite(value) for name, value in t.metrics.items()},
        "length": len(t.token_ids),
        "prompt_length": t.prompt_length,
        "sampled": int(np.count_nonzero(columns.mask)),
        "staleness": record.version - oldest if oldest is not None and record.version is not None else None,
        "mismatch": columns.mismatch(0, len(t.token_ids)),
        "versions": versions,
        "sampled_spans": columns.mask_runs(),
        "has_trainer_logprobs": record.trainer_logprobs is not None,
        "has_advantages": record.advantages is not None,
        "has_text": decoder is not None,
        "trajectories": [str(RecordKey(split, step, group, sample, part)) for part in range(record.parts)],
        "images": [image_of(image) for image in t.images],
        "spans": _spans_json(t),
        "conversation": conversation(columns),
        "prompt_text": _prompt_text(t, decoder),
    }


def conversation(columns: Columns) -> list[dict[str, Any]]:
    """Return the messages of a trajectory in order."""
    t = columns.record.trajectory
    turns = turns_of_messages(t.messages, t.turns)
    calls = {str(span.attributes.get("call_id")): span for span in t.spans if span.name == "tool"}
    shown: list[dict[str, Any]] = []
    position = 0  # of the tokens before which all messages are shown
    for index, message in enumerate(t.messages):
        number = turns.get(index)
        entry = _message_json(message)
        if number is not None:
            turn = t.turns[number]
            entry |= _turn_json(columns, turn, number)
            position = turn.end
        else:
            entry |= {
                "turn": None,
                "tokens": _between(t, turns, index, position),
                "trained": False,
                **_call_span(calls.get(str(message.get("tool_call_id")))),
            }
        shown.append(entry)
    return shown


def _between(t: Trajectory, turns: Mapping[int, int], index: int, position: int) -> list[int] | None:
    """Return the tokens between two turns, if only one message stands there; else nobody knows
    which of them are whose.

    Args:
        position: the end of the turn before.
    """
    if any(0 <= i < len(t.messages) and i not in turns for i in (index - 1, index + 1)):
        return None
    following = t.turns[turns[index + 1]].start if index + 1 in turns else len(t.token_ids)
    return [position, max(position, following)]


def turns_of_messages(messages: Sequence[Message], turns: Sequence[Turn]) -> dict[int, int]:
    """Return which message shows which turn.

    A prompt may hold messages of the assistant that nobody sampled, so the turns are looked for
    from the last one backwards, by their text.
    """
    found: dict[int, int] = {}
    end = len(messages)
    for number in range(len(turns) - 1, -1, -1):
        spoken = [i for i in range(end) if messages[i].get("role") == "assistant"]
        same = [i for i in spoken if messages[i].get("content") == turns[number].text]
        if not (same or spoken):
            break
        end = (same or spoken)[-1]
        found[end] = number
    return found


def image_of(image: Any) -> str | None:
    """Return the digest of a stored image; None if the image is not in the store."""
    digest = image.get("sha256") if isinstance(image, Mapping) else image
    return digest if isinstance(digest, str) and len(digest) == 64 else None


def _message_json(message: Message) -> dict[str, Any]:
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    calls = message.get("tool_calls") or []
    return {
        "role": str(message.get("role")),
        "text": content if isinstance(content, str) else "\n".join(_texts(parts)),
        "reasoning": message.get("reasoning_content"),
        "tool_calls": [_call_json(call) for call in calls if isinstance(call, Mapping)],
        "tool_call_id": message.get("tool_call_id"),
        "name": message.get("name"),
        "images": [image_of(_image(part)) for part in parts if isinstance(part, Mapping) and _is_image(part)],
    }


def _texts(parts: Sequence[Any]) -> list[str]:
    return [str(part["text"]) for part in parts if isinstance(part, Mapping) and part.get("text") is not None]


def _is_image(part: Mapping[str, Any]) -> bool:
    return part.get("type") in ("image", "image_url") or "image" in part or "image_url" in part


def _image(part: Mapping[str, Any]) -> Any:
    return next((part[key] for key in ("image", "image_url") if part.get(key) is not None), None)


def _call_json(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    function = function if isinstance(function, Mapping) else {}
    return {"id": call.get("id"), "name": function.get("name"), "arguments": function.get("arguments")}


def _turn_json(columns: Columns, turn: Turn, number: int) -> dict[str, Any]:
    record, start, end = columns.record, turn.start, turn.end
    t = record.trajectory
    known = [version for version in columns.versions[start:end] if version is not None]
    return {
        "turn": number,
        "tokens": [start, end],
        "latency_s": turn.latency_s,
        "stop_reason": str(turn.stop_reason),
        "malformed_calls": [asdict(call) for call in turn.malformed_calls],
        "cached_tokens": turn.cached_tokens,
        "request_id": turn.request_id,
        "rewards": [
            {"name": reward.name, "value": finite(reward.value)}
            for reward in t.step_rewards
            if (reward.start, reward.end) == (start, end)
        ],
        "version": known[0] if known else None,
        "versions": [min(known), max(known)] if known else None,
        "logprob": _mean(columns.logprobs[start:end]),
        "mismatch": columns.mismatch(start, end),
        "advantage": columns.advantage(start, end),
        "trained": record.advantages is not None and bool(columns.mask[start:end].any()),
    }


def _call_span(span: Span | None) -> dict[str, Any]:
    """Return the facts of a tool call that its message does not have."""
    if span is None:
        return {"latency_s": None, "error": None}
    return {"latency_s": (span.end_ns - span.start_ns) / 1e9, "error": span.error if span.status == "error" else None}


def _spans_json(t: Trajectory) -> list[dict[str, Any]]:
    """Return the spans; `start_s` and `end_s` count from the first: pages round `start_ns`."""
    begin = min((span.start_ns for span in t.spans), default=0)
    return [
        {**asdict(span), "start_s": (span.start_ns - begin) / 1e9, "end_s": (span.end_ns - begin) / 1e9}
        for span in t.spans
    ]


def _fitted(column: Any, n: int, fill: Any) -> Any:
    """Return an array of `n` entries: cut, or filled up with `fill`; None stays None."""
    if column is None or len(column) == n:
        return column
    return np.concatenate((column[:n], np.full(n - min(n, len(column)), fill, column.dtype)))


def _mean(values: np.ndarray) -> float | None:
    finite_values = values[np.isfinite(values)]
    return float(finite_values.mean()) if finite_values.size else None


def _prompt_text(t: Trajectory, decoder: Decoder | None) -> str | None:
    """Return the prompt as the model read it; None without a tokenizer."""
    if decoder is None:
        return None
    ids = [int(token) for token in t.token_ids[: t.prompt_length]]
    try:
        return decoder.text(ids)[:LONGEST_PROMPT_TEXT]
    except (OverflowError, TypeError):
        return None
