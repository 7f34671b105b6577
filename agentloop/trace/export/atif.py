"""ATIF, the agent trajectory interchange format, v1.7: an episode as a document of steps.

A message of the system or a user is a step of that source. A turn of the model is a step of the
agent; the results of its tool calls are its observation, and its metrics hold the exact token ids
and logprobs: `prompt_token_ids` are what the engine was sent, `completion_token_ids` what it
sampled. Other trajectories of the episode (forks) are embedded as `subagent_trajectories`. What the
format has no field for (rewards, versions, the mask's spans) is in `extra`.

https://github.com/laude-institute/harbor/blob/main/rfcs/0001-trajectory-format.md
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from agentloop.text import finite
from agentloop.trace.export.turns import turns_of_messages
from agentloop.trace.record import TraceRecord
from agentloop.types import Message, Trajectory, Turn

VERSION = "ATIF-v1.7"

MEDIA = {"png": "image/png", "jpg": "image/jpeg", "jpeg": "image/jpeg", "gif": "image/gif", "webp": "image/webp"}
"""Media types that the format allows, by the extension of the file."""


@dataclass(frozen=True, slots=True)
class AtifRun:
    """What the documents of a run have in common.

    Attributes:
        version: of agentloop.
        token_ids: write token ids and logprobs. The prompt of each turn holds the turns before it,
            so they grow with the square of the turns.
    """

    name: str
    model: str | None = None
    version: str = "0"
    tools: Sequence[dict[str, Any]] = field(default_factory=list)
    token_ids: bool = True


def atif_document(episode: Sequence[TraceRecord], run: AtifRun) -> dict[str, Any]:
    """Return an episode as a document.

    Args:
        episode: its trajectories, the main one last.
    """
    document = _document(episode[-1], run, len(episode) - 1)
    if len(episode) > 1:
        document["subagent_trajectories"] = [_document(record, run, 0) for record in episode[:-1]]
    return document


def _document(record: TraceRecord, run: AtifRun, others: int) -> dict[str, Any]:
    t = record.trajectory
    steps = _steps(record, run)
    agent: dict[str, Any] = {"name": t.agent_name or "agent", "version": run.version}
    if run.model:
        agent["model_name"] = run.model
    if run.tools:
        agent["tool_definitions"] = list(run.tools)
    notes = [] if t.status == "ok" else [f"{t.status}: {t.error or 'no reason recorded'}"]
    if others:
        notes.append(f"the episode has {others} more trajectories, in subagent_trajectories")
    return _without_none(
        {
            "schema_version": VERSION,
            "session_id": f"{run.name}/{record.key.rsplit('/', 1)[0]}",
            "trajectory_id": record.key,
            "agent": agent,
            "steps": steps,
            "notes": "; ".join(notes) or None,
            "final_metrics": _final_metrics(t, len(steps)),
            "extra": _extra(record),
        }
    )


def _extra(record: TraceRecord) -> dict[str, Any]:
    t = record.trajectory
    return _without_none(
        {
            "step": record.step,
            "split": record.split,
            "policy_version": record.version,
            "part": record.part,
            "parts": record.parts,
            "row": record.row,
            "group_id": t.group_id,
            "sample_index": t.sample_index,
            "task_id": t.task_id,
            "data_source": t.data_source,
            "status": str(t.status),
            "stop_reason": str(t.stop_reason),
            "reward": finite(t.reward),
            "reward_parts": {name: finite(value) for name, value in t.reward_parts.items()},
            "answer": t.answer,
            "trace_id": t.trace_id or None,
            "metrics": {name: finite(value) for name, value in t.metrics.items()},
        }
    )


def _final_metrics(t: Trajectory, steps: int) -> dict[str, Any]:
    return {
        "total_prompt_tokens": sum(turn.start for turn in t.turns),
        "total_completion_tokens": sum(turn.end - turn.start for turn in t.turns),
        "total_cached_tokens": sum(turn.cached_tokens for turn in t.turns),
        "total_steps": steps,
        "extra": {"length": len(t.token_ids), "reward": finite(t.reward)},
    }


def _steps(record: TraceRecord, run: AtifRun) -> list[dict[str, Any]]:
    t = record.trajectory
    turns = turns_of_messages(t.messages, t.turns)
    began = {str(span.attributes.get("request_id")): span.start_ns for span in t.spans if span.name == "turn"}
    steps: list[dict[str, Any]] = []
    for at, message in enumerate(t.messages):
        role = message.get("role")
        if role == "tool" and steps and steps[-1]["source"] == "agent":
            results = steps[-1].setdefault("observation", {"results": []})["results"]
            results.append(_result(message, steps[-1]))
            continue
        step: dict[str, Any] = {"step_id": len(steps) + 1, "source": _source(role), "message": _content(message)}
        if role == "assistant":
            step |= _agent_step(message, turns.get(at), at)
            if (turn := turns.get(at)) is not None:
                step |= _turn_step(record, turn, run)
                if turn.request_id in began:
                    step["timestamp"] = datetime.fromtimestamp(began[turn.request_id] / 1e9, UTC).isoformat()
        elif role == "tool":  # a result whose call is not in the conversation
            step["extra"] = {"role": "tool", "name": message.get("name")}
        steps.append(_without_none(step))
    if not steps:  # the format demands one
        steps.append({"step_id": 1, "source": "system", "message": "", "extra": {"no_messages": True}})
    return steps


def _source(role: object) -> str:
    if role == "assistant":
        return "agent"
    return "system" if role in ("system", "developer", "tool") else "user"


def _agent_step(message: Message, turn: Turn | None, at: int) -> dict[str, Any]:
    calls = [
        {
            "tool_call_id": str(call.get("id") or f"call-{at}-{number}"),
            "function_name": str(call["function"].get("name") or ""),
            **_arguments(call["function"].get("arguments")),
        }
        for number, call in enumerate(message.get("tool_calls") or ())
    ]
    return {
        "reasoning_content": message.get("reasoning_content"),
        "tool_calls": calls or None,
        # Not sampled in this episode: it came with the prompt.
        "is_copied_context": True if turn is None else None,
        "llm_call_count": None if turn is None else 1,
    }


def _arguments(given: Any) -> dict[str, Any]:
    """Return a call's arguments as the format wants them: an object."""
    if isinstance(given, Mapping):
        return {"arguments": dict(given)}
    try:
        read = json.loads(given)
    except (TypeError, ValueError):
        read = None
    return {"arguments": read} if isinstance(read, dict) else {"arguments": {}, "extra": {"arguments": given}}


def _turn_step(record: TraceRecord, turn: Turn, run: AtifRun) -> dict[str, Any]:
    t = record.trajectory
    metrics: dict[str, Any] = {
        "prompt_tokens": turn.start,
        "completion_tokens": turn.end - turn.start,
        "cached_tokens": turn.cached_tokens,
    }
    logprobs = list(t.logprobs[turn.start : turn.end])
    if run.token_ids:
        metrics["prompt_token_ids"] = [int(token) for token in t.token_ids[: turn.start]]
        metrics["completion_token_ids"] = [int(token) for token in t.token_ids[turn.start : turn.end]]
        if all(finite(value) is not None for value in logprobs):
            metrics["logprobs"] = logprobs
    versions = sorted({version for version in t.versions[turn.start : turn.end] if version is not None})
    rewards = [
        {"name": reward.name, "value": finite(reward.value)}
        for reward in t.step_rewards
        if (reward.start, reward.end) == (turn.start, turn.end)
    ]
    extra = {
        "stop_reason": str(turn.stop_reason),
        "latency_s": finite(turn.latency_s),
        "tokens": [turn.start, turn.end],
        "policy_versions": versions or None,
        "step_rewards": rewards or None,
        "malformed_calls": [{"text": call.text, "reason": call.reason} for call in turn.malformed_calls] or None,
        "trained": None if record.advantages is None else bool(record.advantages[turn.start : turn.end].any()),
    }
    return {"metrics": metrics, "extra": _without_none(extra)}


def _result(message: Message, step: dict[str, Any]) -> dict[str, Any]:
    """Return a tool's result; it refers to its call only if the step has that call."""
    known = {call["tool_call_id"] for call in step.get("tool_calls") or ()}
    given = message.get("tool_call_id")
    extra = {"name": message.get("name")} if message.get("name") else None
    result: dict[str, Any] = {"source_call_id": given if given in known else None, "content": _content(message)}
    if given is not None and given not in known:
        extra = {**(extra or {}), "tool_call_id": given}
    return _without_none(result | {"extra": extra})


def _content(message: Message) -> str | list[dict[str, Any]]:
    content: Any = message.get("content")
    if not isinstance(content, list):
        return str(content or "")
    return [_part(part) for part in content]


def _part(part: Any) -> dict[str, Any]:
    """Return a part of a message. An image refers to the store's file; one that is not there, or of
    a type that the format does not have, is text."""
    if isinstance(part, Mapping):
        if part.get("text") is not None:
            return {"type": "text", "text": str(part["text"])}
        stored = next((part[key] for key in ("image", "image_url") if isinstance(part.get(key), Mapping)), None)
        path = str(stored.get("path") or "") if stored is not None else ""
        media = MEDIA.get(path.rpartition(".")[2])
        if media is not None:
            return {"type": "image", "source": {"media_type": media, "path": path}}
    return {"type": "text", "text": f"[{part.get('type', 'part') if isinstance(part, Mapping) else 'part'}]"}


def _without_none(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value is not None}
