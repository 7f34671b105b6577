"""Write files and folders whole or not at all: under a temporary name, then renamed.

A full or broken disk is a `DiskError`, here and wherever `disk_errors` is used. `json_line` and
`read_json` keep integers of any size, and never fail on what a model or a user wrote.
"""

from __future__ import annotations

import errno
import glob
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from agentloop.errors import DiskError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK_FAULTS = (*NO_ROOM, errno.EROFS, errno.EIO)


def disk_error(exc: OSError, path: Path | None = None) -> DiskError | None:
    """Return the error to raise for a failed write; None if the disk is not the cause.

    Args:
        path: what was written; None: the file that `exc` names.
    """
    if exc.errno not in DISK_FAULTS:
        return None
    place = path if path is not None else Path(os.fsdecode(exc.filename)) if exc.filename else None
    free = "" if place is None else free_space(place)
    return DiskError(
        f"{place or 'a file'} could not be written: {exc.strerror or os.strerror(exc.errno)}{free}",
        "free space on that disk (or raise the quota or the limit of file sizes), then repeat"
        if exc.errno in NO_ROOM
        else "check that disk, then repeat",
    )


@contextmanager
def disk_errors(path: Path | None = None) -> Iterator[None]:
    """Turn a full or broken disk within the block into a `DiskError`; arguments as `disk_error`."""
    try:
        yield
    except OSError as exc:
        if (error := disk_error(exc, path)) is not None:
            raise error from exc
        raise


def free_space(path: Path) -> str:
    """Return ` (N MB free on its disk)`, or an empty text if that is unknown."""
    for folder in (path, *path.absolute().parents):
        with suppress(OSError):
            return f" ({shutil.disk_usage(folder).free / 2**20:,.1f} MB free on its disk)"
    return ""


def append_line(path: Path, line: bytes) -> None:
    """Append a line in a single write. If that fails, nothing of it stays.

    Raises:
        DiskError: the disk is full or broken.
    """
    with disk_errors(path), path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        data = line + b"\n"
        try:
            while data:  # a disk that is almost full takes a part
                data = data[file.write(data) :]
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise


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


def real_path(path: Path) -> Path:
    """`Path.resolve`, but a loop of links is left as it is: opening it reports the error."""
    return Path(os.path.realpath(path))


def write_atomic(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file that appears complete or not at all. Creates its folder.

    Args:
        durable: flush to the disk before the rename, so that a power failure cannot leave an empty
            file. Not needed for files that are written again, or that only another process of this
            machine reads.

    Raises:
        DiskError: the disk is full or broken.
    """
    with open_atomic(path, durable=durable) as file:
        file.write(data)


@contextmanager
def open_atomic(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes `path` when the block ends; if it raises, delete it.

    Raises:
        DiskError: the disk is full or broken.
    """
    # Another process or thread may be writing the same file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                yield file
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def remove_abandoned(path: Path) -> None:
    """Remove what processes of this machine that are gone left of `path` in `open_atomic`."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        pid = left.name.removeprefix(path.name + ".").partition("-")[0]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            with suppress(OSError):
                left.unlink(missing_ok=True)
        except (OSError, ValueError, OverflowError):  # another user's process, or another name
            continue


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


def json_line(value: Any) -> bytes:
    """Return a value as one line of JSON, numpy arrays included.

    What JSON in UTF-8 cannot hold becomes what comes closest: a lone surrogate `?`, NaN `null`, any
    other object its text. Integers of any size stay exact: models write such arguments into calls.
    """
    try:
        return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY, default=str) + b"\n"
    except TypeError:  # a lone surrogate, an integer of more than 64 bits, a key that is not text
        return json.dumps(_plain(value), ensure_ascii=False).encode() + b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(_plain(str(key))): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # a numpy array or number
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bool | int | None):
        return value
    return str(value).encode("utf-8", "replace").decode()


_DIGITS_AS_ZERO = bytes.maketrans(b"123456789", b"000000000")
_LONG_NUMBERS = (b"0" * 20, b"-" + b"0" * 19)
"""What may be an integer of more than 64 bits, which orjson would read as a float. Times in
nanoseconds have 19 digits."""


def read_json(text: bytes) -> Any:
    """Read JSON in UTF-8 with exact integers, however large.

    Raises:
        ValueError: it is not JSON.
    """
    found = orjson.loads(text)
    digits = text.translate(_DIGITS_AS_ZERO)  # a regular expression would take longer than all else
    if not any(number in digits for number in _LONG_NUMBERS):
        return found
    try:
        return json.loads(text)
    except RecursionError as exc:
        raise ValueError("it is nested too deeply") from exc


def read_json_leniently(data: bytes) -> Any:
    """Read JSON of any writer: with NaN and lone surrogates too; None if it is not JSON."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        pass
    try:  # the standard library also accepts NaN and lone surrogates, which other writers produce
        return json.loads(data.decode("utf-8", "replace"))
    except (json.JSONDecodeError, RecursionError):
        return None


def read_json_lines(
    path: Path, limit: int | None = None, only: re.Pattern[bytes] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file, one a line; other lines, such as a torn last one, are left
    out.

    Args:
        limit: stop after this many bytes.
        only: skip lines without a match of this pattern, unparsed.
    """
    read = 0
    with path.open("rb") as file:
        for line in file:
            read += len(line)
            if limit is not None and read > limit:
                return
            if only is not None and not only.search(line):
                continue
            data = read_json_leniently(line)
            if isinstance(data, dict):
                yield data
