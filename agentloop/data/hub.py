"""Data sets of the Hugging Face hub and folders saved by `datasets`, read through that library."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from agentloop.errors import DataError

HUB = "hub:"
SPELLING = re.compile(r"hub:(?P<path>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^@]+))?(?:@(?P<split>.+))?")
INSTALL = "pip install 'agentloop-rl[hub]'"

SPLITS = {"data.train": ("train",), "data.val": ("validation", "val", "dev", "test")}
"""Default splits by config key, if the name gives none; the first existing one is taken."""


class TableBatch:
    """A data set with the two members of a record batch that `ArrowRows` uses."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset.with_format("arrow")  # images stay bytes; nothing is decoded
        self.num_rows = len(dataset)

    def slice(self, begin: int, length: int) -> Any:
        """Return rows `begin` to `begin + length` as a table; fewer at the end."""
        return self._dataset[begin : begin + length]


def open_hub(name: str, key: str) -> Sequence[Any]:
    """Open `hub:owner/name[:config][@split]`, downloaded once and memory-mapped.

    Raises:
        DataError: the name is malformed, the library is not installed, or the data set cannot be
            loaded.
    """
    match = SPELLING.fullmatch(name)
    if match is None:
        raise DataError(f"{key}: {name!r} is not the name of a data set", "write hub:owner/name[:config][@split]")
    datasets = _library(name, key)
    try:
        found = datasets.load_dataset(match["path"], match["config"], split=match["split"])
    except Exception as exc:  # the library passes on the exceptions of dozens of others
        raise DataError(
            f"{key}: {name} cannot be loaded: {_first_line(exc)}",
            "correct the name, config and split; without a connection to the hub, download the data set elsewhere "
            "and give its files, or the folder of save_to_disk()",
        ) from exc
    return [TableBatch(_one_split(found, name, key, f"{HUB}owner/name@split"))]


def was_saved(folder: Path) -> bool:
    """Whether this folder was written by `save_to_disk` of `datasets`."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def open_saved(folder: Path, key: str) -> Sequence[Any]:
    """Open a folder written by `save_to_disk` of `datasets`.

    Raises:
        DataError: the library is not installed, or the folder cannot be read.
    """
    datasets = _library(str(folder), key)
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as exc:  # as above
        raise DataError(f"{key}: {folder} cannot be loaded: {_first_line(exc)}", "save it again") from exc
    return [TableBatch(_one_split(found, str(folder), key, f"{folder}/<split>"))]


def _one_split(found: Any, name: str, key: str, spelling: str) -> Any:
    if not isinstance(found, dict):
        return found
    if len(found) == 1:
        return next(iter(found.values()))
    for split in SPLITS.get(key, ()):
        if split in found:
            return found[split]
    raise DataError(f"{key}: {name} has the splits {', '.join(found)}", f"name one: {spelling}")


def _library(name: str, key: str) -> Any:
    try:
        import datasets
    except ImportError as exc:
        raise DataError(f"{key}: {name} needs the library `datasets`, which is not installed", INSTALL) from exc
    return datasets


def _first_line(exc: Exception) -> str:
    return next(_lines(str(exc)), type(exc).__name__)


def _lines(text: str) -> Iterator[str]:
    return (line.strip() for line in text.splitlines() if line.strip())
