"""Rows: from files or functions to validated tasks, and the order in which training sees them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson

from agentloop.errors import DataError, ModelError, RegistryError
from agentloop.imports import is_file_reference, load_from_file
from agentloop.types import Message, Task

IMAGE_MARK = "<image>"
"""Where an image of the column `images` belongs in a prompt's text."""

ROLES = ("system", "developer", "user", "assistant", "tool")


class Renders(Protocol):
    """The part of a `ChatRenderer` that counts prompt tokens."""

    def start(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> list[int]: ...


def load_tasks(source: str | Sequence[str], key: str, default_agent: str) -> tuple[list[Task], int]:
    """Load the rows that `data.train` or `data.val` names.

    Args:
        source: `.jsonl` and `.parquet` files, or `path.py:function` returning rows.
        key: the config key, for messages.

    Returns:
        The tasks, and how many rows had no `agent_name`.

    Raises:
        DataError: naming file, row and column.
    """
    tasks: list[Task] = []
    without_agent = 0
    for name in [source] if isinstance(source, str) else source:
        for number, row in enumerate(_rows(name, key), 1):
            where = f"{name}, row {number}"
            if not isinstance(row, dict):
                raise DataError(f"{where} is no mapping", "write one JSON object per line")
            without_agent += not row.get("agent_name")
            folder = Path() if is_file_reference(name) else Path(name).parent
            tasks.append(_task(row, where, len(tasks), default_agent, folder))
    if not tasks:
        raise DataError(f"{key}: {source} holds no rows", "give a file with at least one row")
    return tasks, without_agent


def check_agents(tasks: Sequence[Task], known: Iterable[str], key: str) -> None:
    """Stop when a row names an agent loop that is not installed.

    Raises:
        RegistryError: naming the row, its agent_name and the known names.
    """
    names = set(known)
    for number, task in enumerate(tasks, 1):
        if task.agent_name not in names:
            raise RegistryError(
                f"{key}: row {number} has agent_name {task.agent_name!r}; known: {', '.join(sorted(names))}",
                "correct the row, or install the package that registers this agent (`agentloop agents list`)",
            )


def drop_overlong(
    tasks: list[Task],
    renderer: Renders,
    schemas: list[dict[str, Any]] | None,
    limit: int,
    overlong: str,
    key: str,
) -> list[Task]:
    """The tasks whose first prompt, tool schemas counted, has at most `limit` tokens.

    Raises:
        DataError: `overlong` is error and a prompt is longer, or none is left; or an image cannot be read.
        ModelError: the chat template cannot render a prompt. Both name the row.
    """
    kept = []
    longest = 0
    for number, task in enumerate(tasks, 1):
        try:
            length = len(renderer.start(task.prompt, schemas))
        except (DataError, ModelError) as exc:
            raise type(exc)(f"{key}: row {number}: {exc.message}", exc.hint) from exc
        longest = max(longest, length)
        if length <= limit:
            kept.append(task)
        elif overlong == "error":
            raise DataError(
                f"{key}: the prompt of row {number} has {length} tokens, more than data.max_prompt_tokens {limit}",
                "raise data.max_prompt_tokens, or set data.overlong=drop",
            )
    if not kept:
        raise DataError(
            f"{key}: every prompt is longer than data.max_prompt_tokens {limit}; the longest has {longest} tokens",
            f"set data.max_prompt_tokens to {longest} or more",
        )
    return kept


class RowOrder:
    """Which row the i-th group of a run works on: epoch after epoch, each in an order of its own.

    A pure function of (rows, seed, i), so that a resumed run needs no saved position.
    """

    def __init__(self, rows: int, seed: int, *, shuffle: bool) -> None:
        self._rows = rows
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = -1
        self._order: np.ndarray[Any, Any] = np.arange(rows)

    def __getitem__(self, index: int) -> int:
        epoch, position = divmod(index, self._rows)
        if self._shuffle and epoch != self._epoch:
            self._order = np.random.default_rng((self._seed, epoch)).permutation(self._rows)
            self._epoch = epoch
        return int(self._order[position])


def _rows(source: str, key: str) -> Iterator[Any]:
    if is_file_reference(source):
        yield from load_from_file(source, key)()
        return
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{key}: {path} does not exist", "give a .jsonl or .parquet file, or path.py:function")
    if path.suffix == ".jsonl":
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if line.strip():
                try:
                    yield orjson.loads(line)
                except orjson.JSONDecodeError as exc:
                    raise DataError(
                        f"{path}, row {number} is not valid JSON: {exc}", "mend or remove that line"
                    ) from exc
    elif path.suffix == ".parquet":
        import pyarrow.parquet as pq

        try:
            yield from pq.read_table(path).to_pylist()
        except (OSError, ValueError) as exc:
            raise DataError(
                f"{path} cannot be read as parquet: {exc}", "write it again with pyarrow or pandas"
            ) from exc
    else:
        raise DataError(f"{key}: {path} is neither .jsonl nor .parquet", "convert it to one of them")


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
            raise DataError(f"{where}: column {column!r} is no mapping", f"write {column} as an object")
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
        raise DataError(f"{where}: column 'prompt' is no list of messages", "write prompt: [{role, content}, ...]")
    return prompt


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise DataError(f"{where} has the role {role!r}", f"use one of {', '.join(ROLES)}")
    if not isinstance(message.get("content"), (str, list)):
        raise DataError(f"{where} has no content", "write a string, or a list of parts")
    return _without_nulls(message)  # type: ignore[no-any-return]


def _located(image: Any, folder: Path) -> Any:
    """An image of a row; a relative path is relative to the file that the row is in."""
    path = image.get("path") if isinstance(image, dict) and not image.get("bytes") else image
    if isinstance(path, str) and "://" not in path and not path.startswith("data:"):
        return str(folder / path)
    return image


def _with_images(messages: list[Message], images: list[Any], where: str) -> list[Message]:
    """The messages with each `<image>` in their texts, or part `{"type": "image"}` without one, replaced by an image.

    Raises:
        DataError: there are more or fewer places than images.
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


def _without_nulls(value: Any) -> Any:
    """Parquet fills the keys that only other messages or parts have with null; templates ask whether a key is there."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
