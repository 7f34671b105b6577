"""Make tasks from rows, one at a time on access: check columns, put images in their places."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast, overload

import numpy as np

from agentloop.data.hub import HUB
from agentloop.data.image_columns import IMAGE_MARK, Place, miscounted
from agentloop.data.messages import decoded, read_messages, strings_of, without_nulls
from agentloop.data.sources import Rows, open_rows
from agentloop.errors import DataError
from agentloop.files import is_file
from agentloop.images import IMAGE_KEYS, RowPath, is_path
from agentloop.imports import is_file_reference
from agentloop.text import did_you_mean
from agentloop.types import TOOL_KWARGS, Message, Task

OTHER_FORMS = ("source", "file_id", "data", "inline_data", "bytes")
"""Keys under which other libraries put an image into a content part."""

OTHER_MEDIA = ("videos", "video", "audios", "audio")
"""Columns of media that no model here takes: a row with them would be another task without."""


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
        takes_images: whether the tasks are for a model that takes images. For such a model an
            `<image>` in a row without images is a mistake; for others it is text.
    """

    def __init__(
        self,
        rows: Rows,
        default_agent: str,
        kept: Sequence[int] | None = None,
        cuts: Mapping[int, CutText] | None = None,
        *,
        takes_images: bool = False,
    ) -> None:
        self._rows = rows
        self._takes_images = takes_images
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
        """Return the name of a task's row for messages: `file, row N`, counted from 0."""
        return self._rows.where(index if self._kept is None else int(self._kept[index]))

    def select(self, indices: Sequence[int], cuts: Mapping[int, CutText] | None = None) -> Tasks:
        """Return the tasks with these indices, in this order. `cuts` has the same indices."""
        numbers = np.arange(len(self._rows)) if self._kept is None else self._kept
        cut = {int(numbers[index]): text for index, text in (cuts or {}).items()}
        kept = numbers[np.asarray(indices, dtype=np.int64)]
        cuts = {**self._cuts, **cut}
        return Tasks(self._rows, self._default_agent, kept.tolist(), cuts, takes_images=self._takes_images)

    def _make(self, number: int, row: Any) -> Task:
        where = self._rows.where(number)
        if not isinstance(row, dict):
            raise DataError(f"{where} is not an object", "write one JSON object per line")

        task = _task(row, where, number, self._default_agent, self._rows, takes_images=self._takes_images)
        if number in self._cuts:
            task.prompt = self._cuts[number].applied(task.prompt)
        return task


def load_tasks(
    source: str | Sequence[str],
    key: str,
    default_agent: str,
    options: Mapping[str, Any] | None = None,
    *,
    takes_images: bool = False,
) -> Tasks:
    """Return the tasks of `data.train` or `data.val`. See `open_rows` for sources and errors, and
    `Tasks` for `takes_images`."""
    return Tasks(open_rows(source, key, options), default_agent, takes_images=takes_images)


def _task(
    row: dict[str, Any], where: str, position: int, default_agent: str, rows: Rows, *, takes_images: bool
) -> Task:
    folder, fills_nulls = rows.folder(position), rows.fills_nulls(position)
    prompt = row.get("prompt")
    if prompt is None:
        raise DataError(
            f"{where} has no column 'prompt' (it has: {', '.join(map(str, row))})",
            "add prompt: [{role, content}, ...] to every row",
        )
    prompt = without_nulls(prompt) if fills_nulls else prompt
    messages = read_messages(prompt, f"{where}: column 'prompt'", f"{where}, prompt message", images=True)

    agent = _agent(row.get("agent_name"), where, folder) or default_agent

    reward_model = _object(row.get("reward_model"), f"{where}: column 'reward_model'")
    extra_info = read_extra_info(row.get("extra_info"), f"{where}: column 'extra_info'", fills_nulls=fills_nulls)
    index = _known(extra_info.get("index"))
    images = row_images(row, where, folder)

    return Task(
        task_id=str(position if index is None else _whole(index)),
        agent_name=agent,
        prompt=with_images(messages, images, where, folder, row=row, takes_images=takes_images),
        data_source=str(row.get("data_source") or ""),
        images=images,
        ability=str(row.get("ability") or ""),
        ground_truth=_known(reward_model.get("ground_truth")),
        reward_style=str(reward_model.get("style") or "rule"),
        extra_info=extra_info,
    )


def _agent(name: Any, where: str, folder: Path) -> str | None:
    """Return a row's agent; a `path.py:Class` beside the row's file becomes absolute.

    Raises:
        DataError: it is not text, or rows of the hub name a file: they may not choose code to run.
    """
    if name is None or name == "":
        return None
    if not isinstance(name, str):
        raise DataError(f"{where}: column 'agent_name' is {name!r}", "write the name of an agent loop")
    if not is_file_reference(name):
        return name
    if where.startswith(HUB):
        raise DataError(
            f"{where} names code to run: agent_name {name!r}", "name the class in the recipe, agents.<name>.class"
        )
    path, _, attribute = name.rpartition(":")
    found = folder / path
    return f"{found.resolve()}:{attribute}" if folder != Path() and is_file(found) else name


def _object(value: Any, place: str) -> dict[str, Any]:
    """Return a column that holds an object, or JSON text of one; empty if it holds nothing."""
    found = decoded(_known(value) or {}, place)
    if not isinstance(found, dict):
        raise DataError(f"{place} is not an object", "write {...}")
    return found


def _known(value: Any) -> Any:
    """Return None for NaN, which stands for a gap in a column of numbers."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _whole(value: Any) -> Any:
    """Return a whole float as an integer: a column of integers with a gap arrives as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def read_extra_info(value: Any, place: str, *, fills_nulls: bool = False) -> dict[str, Any]:
    """Return `extra_info` with the arguments of tools and interactions in their plain form.

    Either may be JSON text, at any level. A null argument is one that the row does not give:
    parquet writes them for keys of other rows, and pydantic for unset fields.

    Args:
        fills_nulls: the source is one that fills in nulls, at any depth.

    Raises:
        DataError: an argument is not where it belongs; the place is named.
    """
    extra_info = _object(value, place)
    clean = without_nulls if fills_nulls else _without_null_values
    if (kwargs := extra_info.get("interaction_kwargs")) is not None:
        kwargs = _object(kwargs, f"{place[:-1]}.interaction_kwargs'")
        extra_info = {**extra_info, "interaction_kwargs": clean(kwargs) or None}

    if (by_tool := extra_info.get("tools_kwargs")) is not None:
        at = f"{place[:-1]}.tools_kwargs"
        tools: dict[str, dict[str, Any]] = {}
        for tool, by_kind in _object(by_tool, f"{at}'").items():
            if by_kind is not None:
                tools[tool] = read_tool_kwargs(by_kind, f"{at}.{tool}'", fills_nulls=fills_nulls)
        extra_info = {**extra_info, "tools_kwargs": tools}
    return extra_info


def read_tool_kwargs(value: Any, place: str, *, fills_nulls: bool = False) -> dict[str, dict[str, Any]]:
    """Return the arguments of one tool in their plain form, by the `TOOL_KWARGS` they are for.

    Args:
        place: where they are, for messages.
        fills_nulls: as in `read_extra_info`.

    Raises:
        DataError: an argument is not where it belongs; the place is named.
    """
    clean = without_nulls if fills_nulls else _without_null_values
    kinds: dict[str, dict[str, Any]] = {}
    for kind, given in _object(value, place).items():
        if given is None:
            continue
        if kind not in TOOL_KWARGS:
            choices = f"use one of {', '.join(TOOL_KWARGS)}"
            raise DataError(f"{place} has the key {kind!r}", did_you_mean(str(kind), TOOL_KWARGS, choices))
        inside = f"{place[:-1]}.{kind}'" if place.endswith("'") else f"{place}, key {kind!r}"
        kinds[kind] = clean(_object(given, inside))
    return kinds


def _without_null_values(value: dict[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if item is not None}


def row_images(row: dict[str, Any], where: str, folder: Path) -> list[Any]:
    """Return the images of a row; paths are relative to `folder`.

    Raises:
        DataError: one of them has an unknown form, the row has videos or audio, or its images are
            in another column.
    """
    for column in OTHER_MEDIA:
        if row.get(column):
            raise DataError(f"{where} has {column}: only text and images can be used", f"remove rows with {column}")
    images = [_located(image, folder) for image in _images(row.get("images"), where)]
    if not images and row.get("image") and _has_mark(row):
        raise DataError(
            f"{where} has {IMAGE_MARK} in its text, and a column 'image': images are read from column 'images'",
            "rename that column",
        )
    return images


def _has_mark(row: dict[str, Any]) -> bool:
    return any(IMAGE_MARK in text for key in ("prompt", "messages") for text in strings_of(row.get(key)))


def _images(value: Any, where: str) -> list[Any]:
    """Return the images of a row: a list or a single image, or JSON text of them."""
    value = _known(value)
    if value is None or (isinstance(value, list | str | bytes) and not value):
        return []
    if isinstance(value, str) and (value[0] + value[-1]) in ("[]", "{}"):
        value = decoded(value, f"{where}: column 'images'")
    images = value if isinstance(value, list) else [value]
    for number, image in enumerate(images, 1):
        _check_image(image, f"{where}: column 'images', image {number}")
    return images


def _check_image(image: Any, place: str) -> None:
    """Refuse what cannot be an image, before a run; whether it can be decoded shows later.

    Raises:
        DataError: it is empty or of an unknown form.
    """
    held = (image.get("bytes") or image.get("path") or image.get("url")) if isinstance(image, dict) else image
    empty = held is None or (isinstance(held, str | bytes) and not held)
    if empty or isinstance(held, int | float | list | dict):
        raise DataError(f"{place} is {reprlib.repr(image)}", "give bytes, {bytes, path}, a path or a data URL")


def _located(image: Any, folder: Path) -> Any:
    """Make the relative path of a row's image absolute: it is relative to the row's file."""
    path = image.get("path") if isinstance(image, dict) and not image.get("bytes") else image
    if not isinstance(path, str) or not is_path(path):
        return image
    if isinstance(path, RowPath) or Path(path).is_absolute():
        return path
    return RowPath(path, folder)


def located_part(part: Any, folder: Path) -> Any:
    """Return a content part whose image, if it is a relative path, is absolute."""
    if not isinstance(part, dict):
        return part
    shown = {**part}
    for key in (*IMAGE_KEYS, "url", "path"):
        value = part.get(key)
        if isinstance(value, dict) and isinstance(value.get("url"), str):
            shown[key] = {**value, "url": _located(value["url"], folder)}
        elif value:
            shown[key] = _located(value, folder)
    return shown


def _image_of(part: dict[str, Any], where: str, folder: Path) -> Any:
    """Return the image that a content part holds; None: it is the next one of the row.

    Raises:
        DataError: it is empty or of an unknown form.
    """
    for key in (*IMAGE_KEYS, "url", "path"):
        if part.get(key) is not None:
            value = part[key]
            value = value["url"] if isinstance(value, dict) and value.get("url") else value
            _check_image(value, f"{where}: the {key} of a content part")
            return _located(value, folder)
    if part.get("base64"):
        return f"data:image/unknown;base64,{part['base64']}"
    others = [key for key in part if key in OTHER_FORMS]
    if others:
        raise DataError(
            f"{where}: a content part with an image has it under {others[0]!r}", "write {type: image, image: ...}"
        )
    return None


def with_images(
    messages: list[Message],
    images: list[Any],
    where: str,
    folder: Path,
    column: str = "prompt",
    *,
    row: Mapping[str, Any],
    takes_images: bool,
) -> list[Message]:
    """Replace each `<image>` in texts, and each empty part `{"type": "image"}`, by the next image.

    A part may also hold its image itself, under `image`, `image_url`, `url`, `path` or `base64`.

    Args:
        where: the row, for errors.
        column: of the messages, for errors.
        row: its columns, for errors.
        takes_images: whether the model takes images. If not, `<image>` in a row without images is
            text like any other; so it is in the model's own messages of such a row.

    Raises:
        DataError: the numbers of places and images differ.
    """
    remaining = iter(images)
    places: list[Place] = []

    def place(number: int, role: str, *, is_mark: bool) -> dict[str, Any]:
        places.append(Place(number, role, is_mark))
        return {"type": "image", "image": next(remaining, None)}

    def parts_of(number: int, message: Message) -> Iterator[dict[str, Any]]:
        content, role = message["content"], message["role"]
        marked = images or (takes_images and role != "assistant")
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part.get("type") in IMAGE_KEYS:
                image = _image_of(part, f"{where}: column {column!r}", folder)
                if image is None:
                    yield place(number, role, is_mark=False)
                else:
                    yield {"type": "image", "image": image}
            elif isinstance(part.get("text"), str):
                for position, text in enumerate(part["text"].split(IMAGE_MARK) if marked else [part["text"]]):
                    if position:
                        yield place(number, role, is_mark=True)
                    if text:
                        yield {**part, "text": text}
            else:
                yield part

    shown: list[Message] = []
    for number, message in enumerate(messages, 1):
        if not images and not takes_images and isinstance(message["content"], str):
            shown.append(message)
            continue
        parts = list(parts_of(number, message))
        if all(part.get("type") == "text" for part in parts):
            shown.append(message)
        else:
            shown.append({**message, "content": parts})

    if len(places) != len(images):
        raise miscounted(row, where, column, len(images), places)
    return shown
