"""Files and folders that are written whole or not at all: a temporary name first, then a rename."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write_atomic(path: Path, data: bytes) -> None:
    """Write a whole file or nothing: temporary name, flush to disk, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def partial_of(folder: Path) -> Path:
    """Where a folder is written before it gets its name: beside it, so that renaming is one step."""
    return folder.with_name(f".{folder.name}.partial")


def rename_folder(partial: Path, folder: Path) -> None:
    """Move a finished folder to its name; one that stands there is replaced."""
    if folder.exists():
        stale = folder.with_name(f".{folder.name}.stale")
        shutil.rmtree(stale, ignore_errors=True)
        os.rename(folder, stale)  # noqa: PTH104
        os.rename(partial, folder)  # noqa: PTH104
        shutil.rmtree(stale)
    else:
        os.rename(partial, folder)  # noqa: PTH104
