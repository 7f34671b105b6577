"""Read fine-tuning rows in the form that chat templates expect, or refuse them.

Messages are read as those of reinforcement learning are (`agentloop.data.messages`). Accepted
beside plain `{messages, tools}`:

* `tools` as JSON text: a parquet column cannot hold objects of different shapes;
* column `images`, whose images replace each `<image>` in the texts of users and tools;
* `train: false` or `weight: 0` on an assistant message: context without loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentloop.data import located_part, open_rows, row_images, with_images, without_nulls
from agentloop.data.messages import decoded, read_messages
from agentloop.errors import DataError, ToolConfigError
from agentloop.tool.schema import read_schema
from agentloop.types import Message

FLAGS = ("train", "weight")
"""Keys of a message that control its loss. Removed before rendering."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in the form of chat templates, and for each message whether it has a loss.

    Attributes:
        images: those of the row's column `images`.
    """

    messages: list[Message]
    trained: list[bool]
    tools: list[dict[str, Any]] | None
    images: list[Any]


def read_rows(source: str | Sequence[str], key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Iterate over the rows of any source of `open_rows`, with their names for messages.

    Args:
        key: the config key of the source, for messages.

    Raises:
        DataError: a row is not an object; file and row are named.
    """
    rows = open_rows(source, key)
    for index in range(len(rows)):
        row = rows[index]
        if not isinstance(row, dict):
            raise DataError(f"{rows.where(index)} is not an object", "write one JSON object a row")
        row = without_nulls(row) if rows.fills_nulls(index) else row
        folder = rows.folder(index)
        if "images" in row:
            row = {**row, "images": row_images(row, rows.where(index), folder)}
        if folder != Path():
            row = _with_located_parts(row, rows.where(index), folder)
        yield rows.where(index), row


def _with_located_parts(row: dict[str, Any], where: str, folder: Path) -> dict[str, Any]:
    """Return a row in which the paths of images in its messages are absolute."""
    messages = row.get("messages")
    if isinstance(messages, str) and '"image' in messages:
        messages = decoded(messages, f"{where}: column 'messages'")
    if not isinstance(messages, list) or not any(map(_has_parts, messages)):
        return row
    return {**row, "messages": [_located(message, folder) for message in messages]}


def _has_parts(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("content"), list | dict)


def _located(message: Any, folder: Path) -> Any:
    if not _has_parts(message):
        return message
    content = message["content"]
    parts = [content] if isinstance(content, dict) else content
    return {**message, "content": [located_part(part, folder) for part in parts]}


def conversation_of(row: dict[str, Any], where: str, *, takes_images: bool = False) -> Conversation:
    """Return the conversation of a row `{messages, tools?}`.

    Args:
        takes_images: whether the model takes images; see `with_images`.

    Raises:
        DataError: the row cannot be used; row and message are named.
    """
    place = f"{where}: column 'messages'"
    messages = decoded(row["messages"], place)
    shown = read_messages(messages, place, f"{where}, message", images=True)
    trained = [_is_trained(message, f"{where}, message {i}") for i, message in enumerate(messages, 1)]
    for number, (message, train) in enumerate(zip(shown, trained, strict=True), 1):
        for flag in FLAGS:
            message.pop(flag, None)  # type: ignore[misc]  # a row's message may have more keys
        if train and _says_nothing(message):
            raise DataError(
                f"{where}, message {number} is an answer without content, tool calls or reasoning: only its end would "
                "be trained",
                'give it content, or mark it "train": false',
            )
    images = row_images(row, where, Path())  # `read_rows` has located them
    shown = with_images(shown, images, where, Path(), "messages", row=row, takes_images=takes_images)
    for number, message in enumerate(shown, 1):
        if message["role"] == "assistant" and isinstance(message["content"], list):
            raise DataError(f"{where}, message {number} of the assistant has an image", "models write text only")
    return Conversation(shown, trained, _tools(row.get("tools"), f"{where}: column 'tools'"), images)


def _tools(value: Any, place: str) -> list[dict[str, Any]] | None:
    """Return the schemas of a row in plain form, as a rollout shows them; None if it has none."""
    tools = decoded(value or None, place)
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise DataError(f"{place} is not a list of schemas", "write [{type: function, function: {...}}]")
    try:
        return [read_schema(decoded(tool, place), place) for tool in tools] or None
    except ToolConfigError as exc:
        raise DataError(exc.message, exc.hint) from exc


def _says_nothing(message: Message) -> bool:
    return not (str(message["content"]).strip() or message.get("tool_calls") or message.get("reasoning_content"))


def _is_trained(message: dict[str, Any], place: str) -> bool:
    train, weight = message.get("train"), message.get("weight")
    if train not in (None, True, False) or weight not in (None, 0, 1):
        raise DataError(
            f"{place} has train {train!r} and weight {weight!r}", "set train to true or false, weight to 0 or 1"
        )
    if message["role"] != "assistant":
        if train or weight:
            raise DataError(f"{place} of role {message['role']} is marked for training", "mark only assistant messages")
        return False
    return train is not False and weight != 0
