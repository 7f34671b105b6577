"""Write the records of a step into one file, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from agentloop.files import open_atomic
from agentloop.trace.record import TraceRecord
from agentloop.trace.store.choice import Choice
from agentloop.trace.store.encode import encode, estimate
from agentloop.trace.store.exact_json import dump
from agentloop.trace.store.images import Digests
from agentloop.trace.store.schema import DICTIONARY, FORMAT, METADATA_KEY, SCHEMA, SPLIT_BYTES, STATISTICS

ROW_GROUP_BYTES = 8 << 20
"""Bytes of a row group before compression: what is read to show one episode."""

OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 3,
    "use_dictionary": list(DICTIONARY),
    "write_statistics": list(STATISTICS),
    "column_encoding": dict.fromkeys(SPLIT_BYTES, "BYTE_STREAM_SPLIT"),
}


@dataclass(frozen=True, slots=True)
class Written:
    """A file that was written.

    Attributes:
        size: of the file, bytes.
        left_out_groups, left_out_episodes: what `max_bytes` had no room for.
    """

    path: Path
    trajectories: int
    tokens: int
    size: int
    left_out_groups: int = 0
    left_out_episodes: int = 0


def write_file(path: Path, records: Sequence[TraceRecord], digests: Digests, choice: Choice) -> int:
    """Write records; return the size of the file.

    Raises:
        DiskError: the disk is full or broken; the file is then not there.
    """
    metadata = {"format": FORMAT, **choice.metadata}
    schema = SCHEMA.with_metadata({METADATA_KEY: dump(metadata).encode()})
    with open_atomic(path, durable=False) as file:
        with pq.ParquetWriter(file, schema, **OPTIONS) as writer:
            for chunk in chunks(records):
                writer.write_table(encode(chunk, digests).replace_schema_metadata(schema.metadata))
        return file.tell()


def chunks(records: Sequence[TraceRecord]) -> Iterator[Sequence[TraceRecord]]:
    """Split records into row groups; yield an empty one if there are none."""
    begin, size = 0, 0
    for i, record in enumerate(records):
        size += estimate([record])
        if size >= ROW_GROUP_BYTES:
            yield records[begin : i + 1]
            begin, size = i + 1, 0
    if begin < len(records) or not records:
        yield records[begin:]
