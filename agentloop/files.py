"""Write files and folders whole or not at all: under a temporary name, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def is_file(path: Path) -> bool:
    """`Path.is_file`, but False where the path cannot exist, such as a name of 300 characters."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_dir(path: Path) -> bool:
    """`Path.is_dir`, but False where the path cannot exist."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def write_atomic(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file that appears complete or not at all. Creates its folder.

    Args:
        durable: flush to the disk before the rename, so that a power failure cannot leave an empty
            file. Not needed for files that are written again, or that only another process of this
            machine reads.
    """
    with open_atomic(path, durable=durable) as file:
        file.write(data)


@contextmanager
def open_atomic(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes `path` when the block ends; if it raises, delete it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def partial_of(folder: Path) -> Path:
    """Return the temporary path next to `folder`, so that one rename completes it."""
    return folder.with_name(f".{folder.name}.partial")


def rename_folder(partial: Path, folder: Path) -> None:
    """Rename a finished folder to `folder`, replacing an earlier one."""
    if folder.exists():
        # Two renames, because a folder cannot be renamed over one that is not empty; deleting takes
        # longest.
        stale = folder.with_name(f".{folder.name}.stale")
        shutil.rmtree(stale, ignore_errors=True)
        folder.rename(stale)
        partial.rename(folder)
        shutil.rmtree(stale)
    else:
        partial.rename(folder)
