"""Damage trace files behind an intact footer."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def damage_column(path: Path, name: str = "trace_id") -> None:
    """Alter the bytes of a column."""
    metadata = pq.ParquetFile(path).metadata
    content = bytearray(path.read_bytes())
    for group in range(metadata.num_row_groups):
        columns = [metadata.row_group(group).column(number) for number in range(metadata.num_columns)]
        (column,) = [column for column in columns if column.path_in_schema == name]
        begin = min(filter(None, (column.data_page_offset, column.dictionary_page_offset)))
        for place in range(begin, begin + column.total_compressed_size):
            content[place] ^= 0x5A
    path.write_bytes(content)


def drop_column(path: Path, name: str = "trace_id") -> None:
    """Write a file without a column."""
    table = pq.read_table(path)
    pq.write_table(table.drop_columns([name]), path)


def empty_cell(path: Path, name: str = "parts") -> None:
    """Make the first cell of a column null."""
    table = pq.read_table(path)
    number = table.schema.get_field_index(name)
    field = table.schema.field(number).with_nullable(True)
    column = pa.array([None, *table[name].to_pylist()[1:]], type=field.type)
    changed = table.set_column(number, field, column).replace_schema_metadata(table.schema.metadata)
    pq.write_table(changed, path)


DAMAGES = {"column": damage_column, "no column": drop_column, "empty cell": empty_cell}
"""Ways to damage a file, by name."""
