"""Episodes as lines of JSON between a run and its sender process.

A line holds what senders use of an episode: all but the columns of tokens, of which they only need
how many were sampled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import orjson

from agentloop.columns import LossMask
from agentloop.images import IMAGE_KEYS
from agentloop.trace.exporting import ExportRun, TracedEpisode
from agentloop.trace.record import TraceRecord
from agentloop.types import TRAJECTORY_FORMAT, Message, Trajectory

PLAIN = (
    "turns", "answer", "stop_reason", "status", "error", "agent_name", "task_id", "group_id", "sample_index",
    "data_source", "spans",
)  # fmt: skip
"""Fields of a trajectory that go out as they are."""


def packed(episode: TracedEpisode, image: Callable[[Any], Any]) -> list[dict[str, Any]]:
    """Return an episode in the form of `unpacked`.

    Args:
        image: returns what stands for an image of a message, a JSON value; None: nothing does.
    """
    return [
        {
            "step": record.step,
            "split": record.split,
            "version": record.version,
            "part": record.part,
            "parts": record.parts,
            "sampled": record.trajectory.sampled_tokens,
            "trajectory": _trajectory(record.trajectory, episode.trace_id, image),
        }
        for record in episode.records
    ]


def unpacked(run: ExportRun, records: Sequence[Mapping[str, Any]]) -> TracedEpisode:
    """Return the episode of `packed`. Its columns are empty, but for as many entries of the mask as
    tokens were sampled."""
    found = []
    for record in records:
        data = {**record["trajectory"], **dict.fromkeys(("token_ids", "loss_mask", "logprobs", "versions"), ())}
        data["reward"] = _read_number(data["reward"])
        data["reward_parts"] = {name: _read_number(value) for name, value in data["reward_parts"].items()}
        trajectory = Trajectory.from_json({"format": TRAJECTORY_FORMAT, "prompt_length": 0, **data})
        mask = LossMask()
        mask.extend(1, record["sampled"])
        trajectory.loss_mask = mask
        places = {name: record[name] for name in ("step", "split", "version", "part", "parts")}
        found.append(TraceRecord(**places, trajectory=trajectory))
    return TracedEpisode(run, tuple(found))


def line(value: Any) -> bytes:
    """Return a value as a line of JSON; what JSON does not have as text."""
    try:
        return orjson.dumps(value, default=str, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS)
    except TypeError:  # a lone surrogate, an integer of more than 64 bits
        return json.dumps(value, default=_fields).encode() + b"\n"


def read_line(text: bytes) -> Any:
    """Return the value of a line.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return json.loads(text)


def _trajectory(trajectory: Trajectory, trace_id: str, image: Callable[[Any], Any]) -> dict[str, Any]:
    data = {name: getattr(trajectory, name) for name in PLAIN}
    data["trace_id"] = trace_id
    data["reward"] = _number(trajectory.reward)
    data["reward_parts"] = {name: _number(value) for name, value in trajectory.reward_parts.items()}
    data["messages"] = [_message(message, image) for message in trajectory.messages]
    return data


def _message(message: Message, image: Callable[[Any], Any]) -> Mapping[str, Any]:
    content = message["content"]
    return message if isinstance(content, str) else {**message, "content": [_part(part, image) for part in content]}


def _part(part: Mapping[str, Any], image: Callable[[Any], Any]) -> Mapping[str, Any]:
    if part.get("type") == "text":
        return part
    value = next((part[key] for key in IMAGE_KEYS if key in part), None)
    shown = None if value is None else image(value)
    return {"type": "image"} if shown is None else {"type": "image", "image": shown}


def _number(value: float | None) -> float | str | None:
    """Return a number as JSON has it: a float that is not finite as its text."""
    return value if value is None or math.isfinite(value) else str(float(value))


def _read_number(value: float | str | None) -> float | None:
    return float(value) if isinstance(value, str) else value


def _fields(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return str(value)
