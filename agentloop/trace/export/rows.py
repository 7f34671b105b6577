"""Episodes as rows of JSON lines: complete records, conversations, and rows of `agentloop sft`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from agentloop.text import finite
from agentloop.trace.export.turns import turns_of_messages
from agentloop.trace.record import TraceRecord
from agentloop.types import Message, StopReason

CUT = (StopReason.LENGTH, StopReason.ABORT, StopReason.CONTEXT)
"""Ends of a turn after which its text is not what the model meant to say."""


class Skipped(Exception):
    """An episode has no form of this kind; the text says why, in words that can be counted."""


def record_rows(episode: Sequence[TraceRecord]) -> Iterator[dict[str, Any]]:
    """Yield each trajectory of an episode with everything that the store knows of it.

    The columns `advantages` and `trainer_logprobs` have one entry a token, null where the mask is
    0.
    """
    for record in episode:
        data = record.trajectory.to_json()
        yield {
            "key": record.key,
            "step": record.step,
            "split": record.split,
            "version": record.version,
            "part": record.part,
            "parts": record.parts,
            "row": record.row,
            **data,
            "advantages": _column(record, record.advantages),
            "trainer_logprobs": _column(record, record.trainer_logprobs),
        }


def _column(record: TraceRecord, values: np.ndarray | None) -> list[float | None] | None:
    if values is None or len(values) != len(record.trajectory.loss_mask):
        return None
    return [
        finite(float(value)) if mask == 1 else None
        for value, mask in zip(values, record.trajectory.loss_mask, strict=True)
    ]


def message_row(episode: Sequence[TraceRecord], tools: Sequence[dict[str, Any]] | None) -> dict[str, Any]:
    """Return an episode's conversation, with its reward and where it comes from."""
    record, main = episode[-1], episode[-1].trajectory
    row: dict[str, Any] = {"messages": main.messages}
    if tools:
        row["tools"] = list(tools)
    return row | {
        "key": record.key,
        "step": record.step,
        "split": record.split,
        "task_id": main.task_id,
        "group_id": main.group_id,
        "sample_index": main.sample_index,
        "agent_name": main.agent_name,
        "status": str(main.status),
        "stop_reason": str(main.stop_reason),
        "reward": finite(main.reward),
        "reward_parts": main.reward_parts,
        "answer": main.answer,
    }


def sft_row(episode: Sequence[TraceRecord], tools: Sequence[dict[str, Any]] | None) -> dict[str, Any]:
    """Return an episode as a row of `agentloop sft` (docs/sft.md).

    Trained are the turns that the model sampled and ended itself: messages of the assistant that
    came with the prompt, cut turns, turns with malformed calls and turns that say nothing are
    marked `"train": false`. What follows the last turn is left out.

    Raises:
        Skipped: the episode was not scored, shows images, or has no turn to train.
    """
    record, main = episode[-1], episode[-1].trajectory
    if main.status != "ok":
        raise Skipped(f"its status is {main.status}")
    if main.images or any(isinstance(message.get("content"), list) and _images(message) for message in main.messages):
        raise Skipped("it shows images, which rows of this format cannot hold")

    turns = turns_of_messages(main.messages, main.turns)
    if not turns:
        raise Skipped("it has no turn of the model")
    messages: list[dict[str, Any]] = []
    for at, message in enumerate(main.messages[: max(turns) + 1]):
        shown: dict[str, Any] = dict(message)
        if message["role"] == "assistant":
            turn = turns.get(at)
            whole = turn is not None and turn.stop_reason not in CUT and not turn.malformed_calls
            if not whole or not _says_something(message):
                shown["train"] = False
        messages.append(shown)
    if not any(message["role"] == "assistant" and message.get("train") is not False for message in messages):
        raise Skipped("no turn is whole: each was cut at a limit, has a malformed call or is empty")

    row: dict[str, Any] = {"messages": messages}
    if tools:
        row["tools"] = list(tools)
    return row | {"key": record.key, "task_id": main.task_id, "reward": finite(main.reward)}


def _says_something(message: Message) -> bool:
    return bool(
        str(message.get("content") or "").strip() or message.get("tool_calls") or message.get("reasoning_content")
    )


def _images(message: Message) -> bool:
    return any(part.get("type") != "text" for part in message["content"] if isinstance(part, dict))
