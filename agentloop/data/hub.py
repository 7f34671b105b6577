"""Data sets of the Hugging Face hub, and folders that `datasets` has saved, through that library."""

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
"""Which split a config key means when none is named."""


class TableBatch:
    """A stretch of a data set in the form of a record batch: a table of its own is made for each slice."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset.with_format("arrow")  # images stay bytes; nothing is decoded
        self.num_rows = len(dataset)

    def slice(self, begin: int, length: int) -> Any:
        """A table of rows `begin` to `begin + length`, as far as there are so many."""
        return self._dataset[begin : begin + length]


def open_hub(name: str, key: str) -> Sequence[Any]:
    """The rows of `hub:owner/name[:config][@split]`, downloaded once and memory mapped.

    Raises:
        DataError: the spelling is wrong, the library is not installed, or the data set cannot be had.
    """
    match = SPELLING.fullmatch(name)
    if match is None:
        raise DataError(f"{key}: {name!r} is no name of a data set", "write hub:owner/name[:config][@split]")
    datasets = _library(name, key)
    try:
        found = datasets.load_dataset(match["path"], match["config"], split=match["split"])
    except Exception as exc:  # the library passes on what dozens of others raise
        raise DataError(
            f"{key}: {name} cannot be loaded: {_first_line(exc)}",
            "correct the name, config and split; without a connection to the hub, download the data set elsewhere "
            "and give its files, or the folder of save_to_disk()",
        ) from exc
    return [TableBatch(_one_split(found, name, key, f"{HUB}owner/name@split"))]


def was_saved(folder: Path) -> bool:
    """Whether `datasets` wrote this folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def open_saved(folder: Path, key: str) -> Sequence[Any]:
    """The rows of a folder that `save_to_disk` of `datasets` has written.

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
