"""Make tasks from rows, one at a time on access: check columns, put images in their places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast, overload

import numpy as np

from agentloop.data.sources import Rows, open_rows
from agentloop.errors import DataError
from agentloop.types import Message, Task

IMAGE_MARK = "<image>"
"""Marks the place of an image of column `images` in a prompt's text."""

ROLES = ("system", "developer", "user", "assistant", "tool")


class CutText(NamedTuple):
    """A shortened text of a prompt, which replaces the row's."""

    message: int
    part: int | None
    """Index of the content part; None: the content is a string."""
    text: str

    def applied(self, prompt: Sequence[Message]) -> list[Message]:
        """Return `prompt` with this text in its place; nothing else differs."""
        shown = list(prompt)
        content: Any = self.text
        if self.part is not None:
            content = list(shown[self.message]["content"])
            content[self.part] = {**content[self.part], "text": self.text}

        shown[self.message] = cast("Message", {**shown[self.message], "content": content})
        return shown


class Tasks(Sequence[Task]):
    """The tasks of a split, in row order. Making one takes about 10 microseconds; none is cached.

    Args:
        rows: rows of the split.
        default_agent: agent loop of rows without `agent_name`.
        kept: row numbers, from 0, of this split's tasks; None: all.
        cuts: shortened texts by row number.
    """

    def __init__(
        self,
        rows: Rows,
        default_agent: str,
        kept: Sequence[int] | None = None,
        cuts: Mapping[int, CutText] | None = None,
    ) -> None:
        self._rows = rows
        self._default_agent = default_agent
        self._kept = None if kept is None else np.asarray(kept, dtype=np.int64)
        self._cuts = dict(cuts or {})

    def __len__(self) -> int:
        return len(self._rows) if self._kept is None else len(self._kept)

    @overload
    def __getitem__(self, index: int) -> Task: ...

    @overload
    def __getitem__(self, index: slice) -> Tasks: ...

    def __getitem__(self, index: int | slice) -> Task | Tasks:
        """Return a task, or the tasks of a slice.

        Raises:
            DataError: the row is wrong; file, row and column are named.
        """
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        number = range(len(self))[index] if self._kept is None else int(self._kept[index])
        return self._make(number, self._rows[number])

    def __iter__(self) -> Iterator[Task]:
        return (task for task, _ in self.walk())

    def walk(self) -> Iterator[tuple[Task, bool]]:
        """Iterate over the tasks, each with whether its row names an agent loop."""
        numbered = (
            enumerate(self._rows)  # reads whole batches, which is cheaper than single rows
            if self._kept is None
            else ((number, self._rows[number]) for number in self._kept.tolist())
        )
        for number, row in numbered:
            task = self._make(number, row)
            yield task, bool(row.get("agent_name"))

    def where(self, index: int) -> str:
        """Return the name of a task's row for messages: `file, row N`."""
        return self._rows.where(index if self._kept is None else int(self._kept[index]))

    def select(self, indices: Sequence[int], cuts: Mapping[int, CutText] | None = None) -> Tasks:
        """Return the tasks with these indices, in this order. `cuts` has the same indices."""
        numbers = np.arange(len(self._rows)) if self._kept is None else self._kept
        cut = {int(numbers[index]): text for index, text in (cuts or {}).items()}
        kept = numbers[np.asarray(indices, dtype=np.int64)]
        return Tasks(self._rows, self._default_agent, kept.tolist(), {**self._cuts, **cut})

    def _make(self, number: int, row: Any) -> Task:
        where = self._rows.where(number)
        if not isinstance(row, dict):
            raise DataError(f"{where} is not an object", "write one JSON object per line")

        task = _task(row, where, number, self._default_agent, self._rows.folder(number))
        if number in self._cuts:
            task.prompt = self._cuts[number].applied(task.prompt)
        return task


def load_tasks(
    source: str | Sequence[str], key: str, default_agent: str, options: Mapping[str, Any] | None = None
) -> Tasks:
    """Return the tasks of `data.train` or `data.val`. See `open_rows` for sources and errors."""
    return Tasks(open_rows(source, key, options), default_agent)


def _task(row: dict[str, Any], where: str, position: int, default_agent: str, folder: Path) -> Task:
    prompt = row.get("prompt")
    if prompt is None:
        raise DataError(
            f"{where} has no column 'prompt' (it has: {', '.join(row)})",
            "add prompt: [{role, content}, ...] to every row",
        )

    reward_model = row.get("reward_model") or {}
    extra_info = row.get("extra_info") or {}
    for column, value in (("reward_model", reward_model), ("extra_info", extra_info)):
        if not isinstance(value, dict):
            raise DataError(f"{where}: column {column!r} is not an object", f"write {column}: {{...}}")

    index = extra_info.get("index")
    messages = [_message(message, f"{where}, prompt message {i}") for i, message in enumerate(_list(prompt, where), 1)]
    images = [_located(image, folder) for image in row.get("images") or []]

    return Task(
        task_id=str(position if index is None else index),
        agent_name=row.get("agent_name") or default_agent,
        prompt=_with_images(messages, images, where) if images else messages,
        data_source=str(row.get("data_source") or ""),
        images=images,
        ability=str(row.get("ability") or ""),
        ground_truth=reward_model.get("ground_truth"),
        reward_style=str(reward_model.get("style") or "rule"),
        extra_info=extra_info,
    )


def _list(prompt: Any, where: str) -> list[Any]:
    if not isinstance(prompt, list) or not prompt:
        raise DataError(f"{where}: column 'prompt' is not a list of messages", "write prompt: [{role, content}, ...]")
    return prompt


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise DataError(f"{where} has the role {role!r}", f"use one of {', '.join(ROLES)}")
    if not isinstance(message.get("content"), (str, list)):
        raise DataError(f"{where} has no content", "write a string, or a list of parts")
    return without_nulls(message)  # type: ignore[no-any-return]  # a dict stays a dict


def _located(image: Any, folder: Path) -> Any:
    """Make the relative path of a row's image absolute: it is relative to the row's file."""
    path = image.get("path") if isinstance(image, dict) and not image.get("bytes") else image
    if isinstance(path, str) and "://" not in path and not path.startswith("data:"):
        return str(folder / path)
    return image


def _with_images(messages: list[Message], images: list[Any], where: str) -> list[Message]:
    """Replace each `<image>` in texts, and each empty part `{"type": "image"}`, by the next image.

    Raises:
        DataError: the numbers of places and images differ.
    """
    remaining = iter(images)
    places = 0

    def place() -> dict[str, Any]:
        nonlocal places
        places += 1
        return {"type": "image", "image": next(remaining, None)}

    def parts_of(content: str | list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part.get("type") == "image" and not {"image", "image_url"} & part.keys():
                yield place()
            elif isinstance(part.get("text"), str):
                for number, text in enumerate(part["text"].split(IMAGE_MARK)):
                    if number:
                        yield place()
                    if text:
                        yield {**part, "text": text}
            else:
                yield part

    shown: list[Message] = []
    for message in messages:
        parts = list(parts_of(message["content"]))
        if all(part.get("type") == "text" for part in parts):
            shown.append(message)
        else:
            shown.append({**message, "content": parts})

    if places != len(images):
        raise DataError(
            f"{where} has {len(images)} images and {places} places for them in its prompt",
            f"write {IMAGE_MARK} in the text where each image belongs",
        )
    return shown


def without_nulls(value: Any) -> Any:
    """Remove nulls: parquet adds keys that only other messages have, and templates test for
    keys."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
