"""A row on its way to an agent worker: exactly what it is here, or an error that names its column.

MessagePack has texts, numbers, lists and objects. What rows hold beside them is marked: tuples,
dates, decimals, numpy arrays, paths of images, images. Two places that show one image show one
image there too.
"""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from agentloop.config import Recipe
from agentloop.errors import ConfigError, DataError, ImageError
from agentloop.images import IMAGE_KEYS, ImageFile, RowPath, read_image
from agentloop.types import Task
from agentloop.worker.frames import LONGEST_FRAME

Ext = msgspec.msgpack.Ext

IMAGE, TUPLE, TEXT, INTEGER, NAMED, ARRAY, ROW_PATH, IMAGE_FILE, SET, PAIRS = range(1, 11)
"""Marks of what MessagePack has no form for."""

_NAMED: dict[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]] = {
    "datetime": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "time": (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
    "decimal": (Decimal, str, Decimal),
    "uuid": (uuid.UUID, str, uuid.UUID),
    "path": (Path, str, Path),
}
"""Types that are sent as a text: by name, how they become one, and how they are made from it."""

_NAME_OF = {kind: name for name, (kind, _, _) in _NAMED.items()} | {type(Path()): "path"}
_PLAIN = frozenset({bool, float, type(None), bytes})
_COLUMNS = tuple(f.name for f in fields(Task))

_encode = msgspec.msgpack.Encoder().encode


LONGEST_ROW = LONGEST_FRAME - 2**20
"""Bytes of a row that can be sent; the rest of a frame is for what is around it."""


class Unsendable(Exception):
    """A value that has no form outside this process. The text names its type."""


def encode_task(task: Task, where: str = "", *, longest: int = LONGEST_ROW) -> bytes:
    """Return a task as bytes.

    Args:
        where: the row, for messages.
        longest: bytes that it may have.

    Raises:
        DataError: a value cannot be sent; its column is named. Or the row is too long.
    """
    where = where or f"row {task.task_id}"
    packer = _Packer()
    packed = []
    for name in _COLUMNS:
        try:
            packed.append(packer.column(name, getattr(task, name)))
        except RecursionError:
            raise DataError(
                f"{where}: {name} holds a value within itself, or one nested too deeply to be sent to an agent worker",
                "flatten it, or set cluster.agents.workers=0",
            ) from None
        except Unsendable as exc:
            raise DataError(
                f"{where}: {name} holds {exc}, which cannot be sent to an agent worker",
                "make it text, a number, a list, a dict, bytes or a numpy array, or set cluster.agents.workers=0",
            ) from exc
    size = sum(map(len, packer.images), len(columns := _encode(packed)))
    if size > longest:
        raise DataError(
            f"{where} has {size:,} bytes; at most {longest:,} can be sent to an agent worker",
            "let the row name files (data.md, Images), or set cluster.agents.workers=0",
        )
    return _encode([packer.images, columns])


def encode_recipe(recipe: Recipe) -> bytes:
    """Return a recipe as bytes, secrets included. Options keep their types, as JSON would not.

    Raises:
        ConfigError: an option, given from Python, cannot be sent.
    """
    try:
        return _encode(pack(recipe.model_dump(by_alias=True)))
    except (Unsendable, RecursionError) as exc:
        raise ConfigError(
            f"the recipe holds {exc}, which cannot be sent to an agent worker",
            "make it text, a number, a list or a dict, or set cluster.agents.workers=0",
        ) from exc


def decode_recipe(data: bytes, folder: str) -> Recipe:
    """Return the recipe of `encode_recipe`, whose file is in `folder`."""
    return Recipe.model_validate(_unpack(data), context={"folder": Path(folder)})


def decode_task(data: bytes) -> Task:
    """Return the task of `encode_task`."""
    packed, columns = _unpack(data)
    images = [_unpack(image) for image in packed]
    return Task(**dict(zip(_COLUMNS, _unpack(columns, images), strict=True)))


class _Packer:
    """Packs the columns of one task.

    Attributes:
        images: packed images, each once.
    """

    def __init__(self) -> None:
        self.images: list[bytes] = []
        self._numbers: dict[int, int] = {}

    def column(self, name: str, value: Any) -> Any:
        """Return a column in a form that MessagePack has."""
        if name == "images":
            return [self._image(image) for image in value]
        if name == "prompt":
            return [{key: self._content(item) for key, item in message.items()} for message in value]
        return pack(value)

    def _content(self, value: Any) -> Any:
        """Return the content of a message: a text, or a list of parts."""
        return [self._part(part) for part in value] if type(value) is list else pack(value)

    def _part(self, part: Any) -> Any:
        if type(part) is not dict:
            return pack(part)
        return _object(
            (pack(key), self._image(item) if key in IMAGE_KEYS and item is not None else pack(item))
            for key, item in part.items()
        )

    def _image(self, image: Any) -> Ext:
        number = self._numbers.get(id(image))
        if number is None:
            number = self._numbers[id(image)] = len(self.images)
            self.images.append(_encode(_packed_image(image)))
        return Ext(IMAGE, number.to_bytes(4))


def _packed_image(image: Any) -> Any:
    if type(image).__module__.startswith("PIL."):
        try:
            image = read_image(image)  # what an episode would make of it
        except ImageError as exc:
            raise Unsendable(f"an image that cannot be read ({exc.message})") from exc
    if isinstance(image, ImageFile):
        return Ext(IMAGE_FILE, _encode([image.data, image.width, image.height]))
    return pack(image)


def pack(value: Any) -> Any:
    """Return a value in a form that MessagePack has, marked where it has none of its own.

    Raises:
        Unsendable: it is of another type.
    """
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is str:
        return value if value.isascii() or _is_text(value) else Ext(TEXT, value.encode("utf-8", "surrogatepass"))
    if kind is int:
        return value if -(2**63) <= value < 2**64 else Ext(INTEGER, str(value).encode())
    if kind is list:
        return [pack(item) for item in value]
    if kind is dict:
        return _object((pack(key), pack(item)) for key, item in value.items())
    return _marked(value, kind)


def _object(packed: Iterable[tuple[Any, Any]]) -> Any:
    """Return a dict in its order; its pairs if a mark is among the keys, which cannot be one."""
    items = list(packed)
    return Ext(PAIRS, _encode(items)) if any(type(key) is Ext for key, _ in items) else dict(items)


def _marked(value: Any, kind: type) -> Ext:
    if kind is tuple:
        return Ext(TUPLE, _encode([pack(item) for item in value]))
    if kind in (set, frozenset):
        return Ext(SET, _encode([kind is frozenset, [pack(item) for item in value]]))
    if kind is RowPath:
        return Ext(ROW_PATH, _encode([value.given, str(value.folder)]))
    if kind in _NAME_OF:
        name = _NAME_OF[kind]
        return Ext(NAMED, _encode([name, _NAMED[name][1](value)]))
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        scalar = isinstance(value, np.generic)
        array = np.ascontiguousarray(value)
        shape = None if scalar else list(np.shape(value))
        return Ext(ARRAY, _encode([array.dtype.str, shape, array.tobytes()]))
    raise Unsendable(f"a value of type {kind.__module__}.{kind.__qualname__}")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unpack(data: bytes | memoryview, images: Sequence[Any] = ()) -> Any:
    """Return the value of packed bytes.

    Args:
        images: of the task, in the order of their numbers.
    """

    def unmark(code: int, content: memoryview) -> Any:
        return images[int.from_bytes(content)] if code == IMAGE else _unmark(code, content)

    return msgspec.msgpack.Decoder(ext_hook=unmark).decode(data)


def _unmark(code: int, content: memoryview) -> Any:
    if code == TEXT:
        return bytes(content).decode("utf-8", "surrogatepass")
    if code == INTEGER:
        return int(bytes(content))
    value = _unpack(content)
    if code == TUPLE:
        return tuple(value)
    if code == SET:
        return frozenset(value[1]) if value[0] else set(value[1])
    if code == PAIRS:
        return dict(value)
    if code == ROW_PATH:
        return RowPath(value[0], Path(value[1]))
    if code == NAMED:
        return _NAMED[value[0]][2](value[1])
    if code == ARRAY:
        array = np.frombuffer(value[2], dtype=value[0])
        return array[0] if value[1] is None else array.reshape(value[1]).copy()
    if code == IMAGE_FILE:
        return ImageFile(*value)
    raise ValueError(f"mark {code} is unknown")
