"""Records and their images in one file, to be moved and read as a whole: groups of a checkpoint.

The columns are those of a trace, and `image_files`, the bytes of each image at the first row that
shows it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from agentloop.images import IMAGE_KEYS
from agentloop.trace.record import TraceRecord
from agentloop.trace.store.decode import decode
from agentloop.trace.store.encode import encode
from agentloop.trace.store.exact_json import dump
from agentloop.trace.store.files import TraceFile
from agentloop.trace.store.images import Digests, ImageFolder
from agentloop.trace.store.schema import FORMAT, METADATA_KEY, SCHEMA
from agentloop.trace.store.writer import OPTIONS, chunks
from agentloop.types import Message

_IMAGE_FILES = pa.field("image_files", pa.map_(pa.string(), pa.binary()))


def write_bundle(records: Sequence[TraceRecord], metadata: Mapping[str, Any]) -> bytes:
    """Return a parquet file of records, whose images are read back as bytes.

    Args:
        metadata: kept in the file, as JSON.
    """
    schema = SCHEMA.append(_IMAGE_FILES).with_metadata(
        {METADATA_KEY: dump({"format": FORMAT, **metadata}).encode()},
    )
    new: dict[str, bytes] = {}
    digests = Digests(new.__setitem__)
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, schema, **OPTIONS) as writer:
        for chunk in chunks(records):
            table = encode(chunk, digests)
            first = [list(new.items()), *([] for _ in range(len(table) - 1))][: len(table)]
            new.clear()
            columns = [*table.columns, pa.array(first, _IMAGE_FILES.type)]
            writer.write_table(pa.table(columns, schema=schema))
    return buffer.getvalue()


def read_bundle(path: Path) -> tuple[list[TraceRecord], dict[str, Any]]:
    """Return the records and the metadata of a file that `write_bundle` made.

    Raises:
        TraceError: it is cut, or of another format.
        KeyError, ValueError, TypeError: it has other columns.
    """
    file = TraceFile(0, "train", path)
    metadata = file.metadata()
    with file.open() as parquet:
        try:
            table = parquet.read()
        except (OSError, pa.ArrowException) as exc:
            raise ValueError(f"it is damaged: {exc}") from exc
    files = {digest: data for row in table.column("image_files").to_pylist() for digest, data in (row or ())}
    records = decode(table, ImageFolder(path.parent))
    for record in records:
        trajectory = record.trajectory
        trajectory.images = [files.get(image["sha256"], image) for image in trajectory.images]
        trajectory.messages = [_with_files(message, files) for message in trajectory.messages]
    return records, metadata


def _with_files(message: Message, files: Mapping[str, bytes]) -> Message:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [_part(part, files) for part in content]}


def _part(part: Any, files: Mapping[str, bytes]) -> Any:
    if not isinstance(part, dict):
        return part
    return {key: files.get(_digest(value), value) if key in IMAGE_KEYS else value for key, value in part.items()}


def _digest(value: Any) -> str:
    return str(value.get("sha256", "")) if isinstance(value, dict) else ""
