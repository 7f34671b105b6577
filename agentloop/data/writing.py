"""Files of rows, as the `prepare` of a recipe's data.py writes them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentloop.errors import ConfigError, DataError
from agentloop.files import json_line, open_atomic, remove_abandoned

Row = Mapping[str, Any]


def write_rows(folder: Path, files: Mapping[str, Sequence[Row]]) -> dict[str, int]:
    """Write files of rows into a folder, and replace those that are there, all or none.

    Args:
        folder: is made if it does not exist.
        files: rows by file name, which ends in `.parquet` or `.jsonl`.

    Returns:
        Number of rows by file name: what `prepare` returns.

    Raises:
        ConfigError: another ending.
        DataError: a file would have no row, or its rows do not fit into one table.
        DiskError: the disk is full or broken.
    """
    for name, rows in files.items():
        if Path(name).suffix not in (".parquet", ".jsonl"):
            raise ConfigError(f"rows cannot be written to {name}", "end the name in .parquet or .jsonl")
        if not rows:
            raise DataError(f"the source has no rows for {name}", "give the whole data set; nothing was written")
    # All are written before the first is renamed: a full disk or a kill does not mix two sources.
    with contextlib.ExitStack() as opened:
        for name, rows in files.items():
            remove_abandoned(folder / name)
            file = opened.enter_context(open_atomic(folder / name))
            if name.endswith(".jsonl"):
                file.writelines(map(json_line, rows))
            else:
                _write_parquet(file, name, rows)
    return {name: len(rows) for name, rows in files.items()}


def _write_parquet(file: Any, name: str, rows: Sequence[Row]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pa.Table.from_pylist(list(rows))
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as exc:
        hint = "give a column the same type in all rows, or write .jsonl"
        raise DataError(f"the rows of {name} do not fit into one table: {exc}", hint) from exc
    pq.write_table(table, file)
