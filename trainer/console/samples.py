"""Decoded episodes as lines of text: the question, each turn with its speaker, the reward."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console as RichConsole
from rich.text import Text

from agentloop.text import clean, finite, number
from agentloop.types import Message

LONGEST_CALL = 300
"""Characters printed of a call that could not be read."""

SAMPLE_LINES = 14
"""Lines printed of one message; the rest is counted."""

LABEL_WIDTH = 10

LABELS = {
    "question": ("question", "none"),
    "assistant": ("model", "cyan"),
    "calls": ("calls", "bold cyan"),
    "malformed": ("malformed", "red"),
    "tool": ("tool", "yellow"),
    "user": ("user", "yellow"),
    "expected": ("expected", "dim"),
}
"""Kind of a part -> its label and style."""


def sample_lines(sample: Mapping[str, Any], rich: RichConsole, width: int) -> Iterator[Text]:
    """Yield the lines of one decoded episode.

    Args:
        sample: `step`, `messages` (`Trajectory.messages`) and `reward`; optionally `task_id`,
            `stop_reason`, `error`, `expected`, the correct answer, and `malformed_calls`: index of
            a message -> the texts of its calls that could not be read.
        width: columns of the output.
    """
    reward = finite(sample.get("reward"))
    title = Text.assemble(("sample", "bold"), f"   step {clean(sample.get('step', '?'), 12)}")
    title.append(f"   row {clean(sample['task_id'], 60)}" if sample.get("task_id") not in (None, "") else "")
    title.append("   reward ")
    title.append(number(reward), style="bold green" if reward else "bold red")
    for key in ("stop_reason", "error"):
        title.append(f"   {clean(sample[key], 200)}" if sample.get(key) else "", style="dim")
    yield title

    parts = list(_parts(sample.get("messages") or [], sample.get("malformed_calls") or {}))
    if sample.get("expected") is not None:
        parts.append(("expected", sample["expected"]))

    text_width = max(20, width - LABEL_WIDTH - 4)
    for kind, text in parts:
        label, style = LABELS.get(kind, (clean(kind, LABEL_WIDTH - 1), "yellow"))
        lines = list(Text(clean(text).strip("\n").expandtabs(4)).wrap(rich, text_width, overflow="fold"))
        for index, line in enumerate(lines[:SAMPLE_LINES] or [Text()]):
            line.rstrip()
            line.stylize(style)
            yield Text.assemble("  ", (f"{label if not index else '':<{LABEL_WIDTH}}", f"bold {style}"), line)
        if len(lines) > SAMPLE_LINES:
            yield Text(" " * (LABEL_WIDTH + 2) + f"… {len(lines) - SAMPLE_LINES} more lines", style="dim")


def _parts(messages: Sequence[Message], malformed: Mapping[int, Sequence[str]]) -> Iterator[tuple[str, str]]:
    """Yield (kind, text) from the question on: the last message before the model's first turn."""
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    start = max(0, first - 1)
    for index, message in enumerate(messages[start:], start=start):
        text = _content(message)
        calls = message.get("tool_calls") or []
        unread = malformed.get(index) or ()
        if text or not (calls or unread):
            yield "question" if index < first else message["role"], text
        for call in calls:
            function = call["function"]
            yield "calls", f"{function['name']}({json.dumps(function['arguments'], ensure_ascii=False, default=str)})"
        for call_text in unread:
            yield "malformed", clean(call_text, LONGEST_CALL)


def _content(message: Message) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return " ".join(str(part.get("text", f"[{part.get('type', 'part')}]")) for part in content or [])
