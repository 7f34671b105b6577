"""Open the traces of a run, and say what of them is missing or cut."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from agentloop.commands.runs import check_is_run, found_runs, is_run
from agentloop.commands.trace.settings import read_config
from agentloop.errors import TraceError
from agentloop.text import clean

if TYPE_CHECKING:
    import pyarrow as pa

    from agentloop.trace.export import Selection
    from agentloop.trace.record import TraceRecord
    from agentloop.trace.store import TraceFile, TraceStore

STEPS = re.compile(r"(\d{1,18})(?:-(\d{1,18}))?$")
SHOWN_PROBLEMS, MOST_STEPS = 10, 12


def open_store(run: Path) -> TraceStore:
    """Return the store of a run directory.

    Raises:
        TraceError: it is not that of a run, or holds no traces.
    """
    from agentloop.trace.store import TraceStore

    check_is_run(run)
    store = TraceStore(run)
    if not store.files():
        if "stages" in read_config(run):
            raise TraceError(
                f"{clean(run, 300)} is a run of `agentloop sft`, on given conversations: it has no episodes",
                "its rows are those of `stages`; `agentloop eval` and `agentloop train` write episodes",
            )
        fix = (
            "give the directory of a run whose first step is done (trace.train_every chooses the steps that are traced)"
        )
        if not is_run(run):
            fix = found_runs(fix, beside=run)
        raise TraceError(f"{clean(run, 300)} holds no traces", fix)
    return store


class Reading:
    """The trace files of a run that a command reads; collects what could not be read.

    Args:
        steps: `7` or `3-9`; None: all.
        split: `train`, `eval`, or `all`.

    Raises:
        TraceError: no trace matches.
    """

    def __init__(self, run: Path, steps: str | None = None, split: str = "all") -> None:
        self.store = open_store(run)
        self._unread: dict[Path, str] = {}
        first, last = _bounds(steps)
        files = self.store.files(None if split == "all" else split)
        self.files = [file for file in files if first <= file.step and (last is None or file.step <= last)]
        if not self.files:
            kind = "" if split == "all" else f"{split} "
            raise TraceError(
                f"{clean(run, 300)} has no {kind}trace{'' if steps is None else f' of step {steps}'}",
                f"steps that have one: {_few(sorted({file.step for file in files}))}",
            )

    def tables(self, columns: Sequence[str]) -> Iterator[tuple[TraceFile, pa.Table]]:
        """Yield some columns of each file that can be read."""
        for file in self.files:
            found = False
            for pair in self.store.scan(columns, files=[file]):
                found = True
                if file.old:
                    self._count_lost(file, len(pair[1]))
                yield pair
            if not found:
                self._failed(file)

    def select(self, selection: Selection) -> pa.Table:
        """Return the main trajectories that match, with the columns of `selection.COLUMNS`."""
        import pyarrow as pa

        from agentloop.trace.export.selection import none_selected

        found = [selection.of(table) for _, table in self.tables(selection.columns)]
        return pa.concat_tables(found) if found else none_selected()

    def episodes(self, keys: Iterable[str]) -> Iterator[list[TraceRecord]]:
        """Yield the episodes of some main trajectories, one in memory at a time; each is its
        trajectories, the main one last."""
        from agentloop.trace.record import RecordKey

        wanted = {RecordKey.parse(key)[:4] for key in keys}
        for file in self.files:
            if not any((split, step) == (file.split, file.step) for split, step, *_ in wanted):
                continue
            try:
                for place, records in groupby(
                    self.store.iterate(file.step, file.split), lambda record: RecordKey.parse(record.key)[:4]
                ):
                    if place in wanted:
                        yield list(records)
            except TraceError as exc:
                self._unread[file.path] = exc.message

    def last_texts(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the text of the last turn of some main trajectories, by key."""
        from agentloop.trace.export.selection import key_of
        from agentloop.trace.record import RecordKey
        from agentloop.trace.store.schema import KEY

        wanted = set(keys)
        places = {RecordKey.parse(key)[:2] for key in wanted}
        texts: dict[str, str] = {}
        for file in self.files:
            if (file.split, file.step) not in places:
                continue
            for _, table in self.store.scan((*KEY, "turns"), files=[file]):
                names = [key_of(row) for row in table.select(list(KEY)).to_pylist()]
                for name, place in zip(names, range(len(table)), strict=True):
                    if name in wanted:
                        texts[name] = _last_text(table["turns"][place].as_py())
        return texts

    def _count_lost(self, file: TraceFile, rows: int) -> None:
        from agentloop.trace.store.old_form import count_lines

        lines = count_lines(file)
        if lines > rows:
            lost = "none" if not rows else f"{rows:,}"
            self._unread[file.path] = f"{lost} of the {lines:,} lines of {file.path} can be read"

    @property
    def is_unread(self) -> bool:
        """Whether something of what `tables` has read could not be read."""
        return bool(self._unread)

    def _failed(self, file: TraceFile) -> None:
        try:
            file.metadata()
            self._unread[file.path] = f"{file.path} is cut or damaged"
        except TraceError as exc:
            self._unread[file.path] = exc.message

    def problems(self) -> list[str]:
        """Return a sentence for each file that is cut, missing or left over, and on groups that the
        store had no room for."""
        found = list(self._unread.values())
        found += [str(problem) for problem in self.store.problems() if problem.path not in self._unread]
        groups = steps = 0
        for file in self.files:
            if file.path not in self._unread and not file.old:
                left_out = int(file.metadata().get("left_out_groups") or 0)
                groups, steps = groups + left_out, steps + bool(left_out)
        if groups:
            found.append(f"trace.max_bytes_per_step left out {groups:,} groups of {steps:,} steps")
        return found


def _few(steps: Sequence[int]) -> str:
    """Return steps as text: all of a few, else the first and the last."""
    if not steps:
        return "none"
    if len(steps) <= MOST_STEPS:
        return ", ".join(map(str, steps))
    return f"{steps[0]} to {steps[-1]} ({len(steps)} steps)"


def say_problems(problems: Sequence[str]) -> None:
    """Print what is missing or cut to standard error."""
    for problem in problems[:SHOWN_PROBLEMS]:
        print(f"warning: {clean(problem)}", file=sys.stderr)
    if len(problems) > SHOWN_PROBLEMS:
        print(f"warning: {len(problems) - SHOWN_PROBLEMS} more files are cut or left over", file=sys.stderr)


def find_episode(store: TraceStore, key: str) -> TraceRecord:
    """Return a trajectory by its key; without `/part`, the main trajectory of the episode.

    Raises:
        TraceError: there is none, or its file is cut.
    """
    from agentloop.trace.record import RecordKey

    try:
        RecordKey.parse(key)
    except ValueError:
        with_part = f"{key}/0"
    else:
        return store.record(key)
    try:
        RecordKey.parse(with_part)
    except ValueError:
        with_part = key  # neither form: the store's error names what was written
    try:
        first = store.record(with_part)
    except TraceError:
        _refuse_group(store, key)
        raise
    return first if first.is_main else store.record(main_key(first))


def _refuse_group(store: TraceStore, key: str) -> None:
    """Raise if a key is that of a group: `train/60/g59`.

    Raises:
        TraceError: with the keys of its episodes.
    """
    from agentloop.trace.store.schema import KEY

    split, _, rest = key.partition("/")
    step, _, group = rest.partition("/")
    files = [file for file in store.files() if file.split == split and str(file.step) == step]
    samples = {
        row["sample_index"]
        for _, table in store.scan(KEY, files=files)
        for row in table.select(["group_id", "sample_index"]).to_pylist()
        if row["group_id"] == group and row["sample_index"] is not None
    }
    if samples:
        keys = [f"{key}/{sample}" for sample in sorted(samples)]
        shown = ", ".join(keys[:MOST_STEPS]) + (", ..." if len(keys) > MOST_STEPS else "")
        raise TraceError(f"{clean(key, 200)} is a group of {len(keys)} episodes", f"give one of them: {clean(shown)}")


def _last_text(turns: str | None) -> str:
    """Return the text of the last turn of a cell; empty if it holds none."""
    import orjson

    try:
        found = orjson.loads(turns or "[]")
        return str(found[-1].get("text") or "") if found else ""
    except (ValueError, TypeError, LookupError, AttributeError):
        return ""


def main_key(record: TraceRecord) -> str:
    """Return the key of the main trajectory of a trajectory's episode."""
    from agentloop.trace.record import RecordKey

    return str(RecordKey.parse(record.key)._replace(part=record.parts - 1))


def _bounds(steps: str | None) -> tuple[int, int | None]:
    """Read `7` or `3-9`.

    Raises:
        TraceError: it is neither.
    """
    if steps is None:
        return 0, None
    found = STEPS.match(steps)
    if found is None:
        raise TraceError(f"--step {clean(steps, 60)!r} is not a step", "write --step 7, or --step 3-9 for several")
    first, last = int(found[1]), int(found[2] or found[1])
    if last < first:
        raise TraceError(f"--step {steps} is backwards", f"write --step {last}-{first}")
    return first, last
