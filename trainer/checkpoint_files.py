"""The files of a checkpoint: sealed with checksums when it is written, verified when it is read.

`state.json` is written last. Beside the state of the run it holds size and checksum of every other
file, and its own checksum. So a file that was cut, altered or lost is named before anything loads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from agentloop.errors import RunDirError
from agentloop.files import write_atomic

STATE_FILE = "state.json"
"""State of the run and checksums, written last: a folder without it is not a checkpoint."""

TENSORS = "trainer"
"""Folder inside a checkpoint with model, optimizer and random state."""

GROUPS_FILE, OLD_GROUPS_FILE = "groups.parquet", "groups.jsonl"
"""Finished groups that are not trained yet, and the form that earlier versions wrote. Without it
they are sampled again."""

NEEDLESS = (GROUPS_FILE, OLD_GROUPS_FILE)
"""Files that a resumed run can do without."""

FILES, CHECKSUM = "files", "checksum"
"""Keys of `state.json` that belong to the seal."""

READ_BYTES = 1 << 22
THREADS = 8


class BrokenCheckpoint(RunDirError):
    """A checkpoint is damaged.

    Args:
        folder: of the checkpoint.
        fault: which file, and what happened to it.
    """

    def __init__(self, folder: Path, fault: str, hint: str | None = None) -> None:
        super().__init__(f"the checkpoint {folder} is damaged: {fault}", hint)
        self.folder = folder
        self.fault = fault

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.folder, self.fault, self.hint))


def seal(folder: Path, state: Mapping[str, Any]) -> None:
    """Write `state.json` with the checksums of all other files: the checkpoint is complete.

    Raises:
        OSError: a file cannot be read, or the state cannot be written.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != STATE_FILE)
    with ThreadPoolExecutor(THREADS) as pool:
        sums = pool.map(file_checksum, paths)
        files = {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, CHECKSUM: checksum}
            for path, checksum in zip(paths, sums, strict=True)
        }
    body = {key: value for key, value in state.items() if key != CHECKSUM} | {FILES: files}
    write_atomic(folder / STATE_FILE, json.dumps({**body, CHECKSUM: _own_checksum(body)}).encode())


def read_state(folder: Path) -> dict[str, Any]:
    """Return the state of a checkpoint.

    Raises:
        BrokenCheckpoint: `state.json` is missing, cut or altered.
    """
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BrokenCheckpoint(folder, f"it has no {STATE_FILE}") from None
    except OSError as exc:
        raise BrokenCheckpoint(folder, f"{STATE_FILE} cannot be read ({exc.strerror})") from exc
    except (ValueError, RecursionError):
        raise BrokenCheckpoint(folder, f"{STATE_FILE} is not JSON; it was cut or altered") from None

    counted = isinstance(state, dict) and all(type(state.get(key)) is int for key in ("step", "version"))
    if not counted:
        raise BrokenCheckpoint(folder, f"{STATE_FILE} has no step and version; it was altered")
    sealed = {key: value for key, value in state.items() if key != CHECKSUM}
    if state.keys() & {FILES, CHECKSUM} and state.get(CHECKSUM) != _own_checksum(sealed):
        raise BrokenCheckpoint(folder, f"{STATE_FILE} was altered: it has another checksum")
    return dict(state)


def verify(folder: Path) -> list[str]:
    """Compare the files of a checkpoint with its seal.

    A checkpoint that an earlier version wrote has no checksums; only the presence of the tensors is
    checked then (`is_sealed`).

    Returns:
        names of damaged files that a run can do without.

    Raises:
        BrokenCheckpoint: a file that it needs is missing, cut or altered.
    """
    state = read_state(folder)
    files = state.get(FILES, {f"{TENSORS}/.metadata": {}})
    with ThreadPoolExecutor(THREADS) as pool:
        faults = list(pool.map(lambda name: _fault(folder / name, files[name]), files))

    needless = []
    for name, fault in zip(files, faults, strict=True):
        if fault is None or (name in NEEDLESS and not (folder / name).exists()):
            continue  # deleting the groups is a documented way to sample them again
        if name not in NEEDLESS:
            raise BrokenCheckpoint(folder, f"{name} {fault}")
        needless.append(name)
    return needless


def is_sealed(state: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint has checksums."""
    return FILES in state


def file_checksum(path: Path) -> str:
    """Return the XXH3 checksum of a file."""
    checksum = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            checksum.update(chunk)
    return checksum.hexdigest()


def _fault(path: Path, sealed: Mapping[str, Any]) -> str | None:
    """Return what happened to a file since it was sealed; None: nothing."""
    try:
        size = path.stat().st_size
        if size != sealed.get("bytes", size):
            return f"has {size:,} bytes instead of {sealed['bytes']:,}"
        if CHECKSUM in sealed and file_checksum(path) != sealed[CHECKSUM]:
            return "was altered: it has another checksum"
    except FileNotFoundError:
        return "is missing"
    except OSError as exc:
        return f"cannot be read ({exc.strerror})"
    return None


def _own_checksum(state: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(state, sort_keys=True).encode()).hexdigest()
