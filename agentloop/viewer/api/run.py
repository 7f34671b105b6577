"""One run, as the API reads it: configuration, metrics, trace index, tokenizer."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any

import orjson

from agentloop.errors import TraceError
from agentloop.files import is_file
from agentloop.report.reading import RunRecord
from agentloop.text import finite
from agentloop.trace.index import TraceIndex
from agentloop.trace.record import TraceRecord
from agentloop.trace.signals import RULES, signals_and_note
from agentloop.trace.store.files import step_folders
from agentloop.trace.store.images import ImageFolder
from agentloop.viewer.api.decoder import Decoder
from agentloop.viewer.api.metrics import thin

CONFIG_FILE, METRICS_FILE, FINISHED_FILE, LOCK_FILE = "config/resolved.json", "metrics.jsonl", "finished.json", ".lock"

SPARK = 60
"""Points of the small curve in the table of runs."""

RECENT_S = 300.0
"""If its lock cannot be seen, a run counts as live this long after its last line of metrics."""

REFRESH_EVERY_S = 0.5
PATIENCE_S = 3.0
"""How long a request waits for the index; then it answers with the steps that are indexed."""

LATEST = 3
"""Steps whose folders are watched for files: an evaluation is written while later steps run."""

KEPT_RECORDS = 8
KEPT_TOKENS = 1_000_000
"""Trajectories kept in memory, and their tokens together: a page asks for one in parts."""

SEVERITY = {"warning": "warn", "notice": "info"}
_RULES = [
    {"rule": rule.name, "title": rule.title, "bound": rule.bound, "severity": SEVERITY[rule.severity]}
    for rule in RULES.values()
]

_indexer = ThreadPoolExecutor(1, "trace-index")
"""Runs are indexed one after another: an index takes a core."""


def warm_up() -> None:
    """Import in a thread what the first episode would wait for."""
    _indexer.submit(_import_readers)


def _import_readers() -> None:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet
    import tokenizers  # noqa: F401

    pc.equal(pa.array(["a"]), "a")  # the first computation imports pandas, if that is installed


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run directory, not a folder of them."""
    return is_file(folder / METRICS_FILE) or is_file(folder / CONFIG_FILE)


class Run:
    """A run directory. Methods block, and may be called from any thread.

    Args:
        run_id: names it in URLs.
    """

    def __init__(self, run_id: str, path: Path) -> None:
        self.id = run_id
        self.path = path
        self._lock = threading.Lock()
        self._record: tuple[Any, RunRecord] | None = None
        self._decode: tuple[Any, Decoder | None] | None = None
        self._index = TraceIndex(path)
        self._refresh: Future[bool] | None = None
        self._refreshed = -REFRESH_EVERY_S
        self._fault: str | None = None
        self._latest: tuple[Any, int, list[Path]] | None = None
        self._judging = threading.Lock()
        self._signals: tuple[Any, dict[str, Any]] | None = None
        self._records: OrderedDict[tuple[Any, ...], TraceRecord] = OrderedDict()

    def close(self) -> None:
        """Close the index; if it is being made, stop."""
        if self._refresh is not None:
            self._refresh.cancel()
        self._index.close()

    # -- state

    @property
    def name(self) -> str:
        """The name that its configuration gives it, or its folder's."""
        given = self.record.setting("run.name")
        return str(given) if given else os.fsencode(self.path.name).decode("utf-8", "replace")

    @property
    def changed(self) -> float | None:
        """Unix time of its last line of metrics, or of its configuration; None: it has neither."""
        for name in (METRICS_FILE, CONFIG_FILE):
            if (found := _mtime(self.path / name)) is not None:
                return found
        return None

    @property
    def started(self) -> float | None:
        """Unix time at which its configuration was written."""
        return _mtime(self.path / "env.json") or _mtime(self.path / CONFIG_FILE)

    @property
    def finished(self) -> bool:
        """Whether it reached its end."""
        return is_file(self.path / FINISHED_FILE)

    @property
    def live(self) -> bool:
        """Whether a process works on it."""
        if self.finished:
            return False
        held = _is_locked(self.path / LOCK_FILE)
        return held if held is not None else time.time() - (self.changed or 0.0) < RECENT_S

    @property
    def record(self) -> RunRecord:
        """Configuration and metrics, read again when a file changed."""
        names = (METRICS_FILE, CONFIG_FILE, "env.json")
        signature = tuple(_signature(self.path / name) for name in names)
        with self._lock:
            if self._record is None or self._record[0] != signature:
                self._record = signature, _read_record(self.path)
            return self._record[1]

    @property
    def kind(self) -> str:
        """`train`, `sft` or `eval`."""
        record = self.record
        if record.is_sft:
            return "sft"
        only = record.setting("eval.only") is True
        return "eval" if only or (record.rows and not record.train_rows and self.finished) else "train"

    # -- traces

    def index(self, patience_s: float = PATIENCE_S) -> TraceIndex:
        """Return the index; wait for a moment until it is up to date.

        A run's first index may take longer: then the steps that it does not hold yet are missing
        (`indexing`).
        """
        with self._lock:
            running = self._refresh is not None and not self._refresh.done()
            if not running and time.monotonic() - self._refreshed >= REFRESH_EVERY_S:
                self._refresh = _indexer.submit(self._update)
            refresh = self._refresh
        if refresh is not None and not refresh.done():
            wait_for([refresh], timeout=patience_s)
        return self._index

    @property
    def indexing(self) -> bool:
        """Whether steps are missing in the index that is being made."""
        return self._refresh is not None and not self._refresh.done()

    def _update(self) -> bool:
        try:
            changed = self._index.refresh()
            self._fault = None
        except TraceError as exc:
            self._fault, changed = exc.message, False
        except Exception as exc:  # noqa: BLE001  # nobody reads the future: it must not end unseen
            self._fault, changed = f"it cannot be brought up to date: {exc!r}", False
        self._refreshed = time.monotonic()
        return changed

    def problems(self) -> list[dict[str, str]]:
        """Return the files that cannot be read: `{file, problem}`."""
        found = self._index.problems()
        if self._fault is not None:
            found.append({"file": "traces/index.sqlite", "problem": self._fault})
        return found

    def trajectory(self, key: str) -> TraceRecord:
        """Return a trajectory of the trace, from memory if it was read a moment ago.

        Raises:
            TraceError: there is none of this key, or its file is cut.
        """
        split, step = key.split("/", 2)[:2]
        path = self._index.store.path(int(step), split)
        name = key, _signature(path)
        with self._lock:
            if name in self._records:
                self._records.move_to_end(name)
                return self._records[name]
        try:
            record = self._index.store.record(key)
        except (ValueError, KeyError, TypeError, OSError) as exc:
            raise TraceError(f"{path} cannot be read: {exc!r}") from exc
        with self._lock:
            self._records[name] = record
            while len(self._records) > KEPT_RECORDS or (
                len(self._records) > 1 and sum(len(kept.trajectory) for kept in self._records.values()) > KEPT_TOKENS
            ):
                self._records.popitem(last=False)
        return record

    def decoder(self) -> Decoder | None:
        """Return the tokenizer's decoder; None: it is not here, and ids are all there is."""
        model = self.record.setting("model.path")
        with self._lock:
            if self._decode is None or self._decode[0] != model:
                self._decode = model, Decoder.load(model, self.path)
            return self._decode[1]

    @property
    def has_traces(self) -> bool:
        """Whether it has begun to write traces."""
        return self._index.store.folder.is_dir()

    @property
    def images(self) -> ImageFolder:
        """The images of the trace."""
        return self._index.store.images

    def trace_changes(self) -> int:
        """Return a number that changes when a trace file is written or removed. Cheap: it is asked
        for every second."""
        traces = self._index.store.folder
        changed = _signature(traces)
        if self._latest is None or self._latest[0] != changed:
            folders = list(step_folders(traces).values())
            self._latest = changed, len(folders), folders[-LATEST:]
        _, count, latest = self._latest
        return hash((count, *latest, *map(_signature, latest)))

    def signals(self) -> dict[str, Any]:
        """Return what looks wrong, and the rules that were checked."""
        signature = _signature(self.path / METRICS_FILE), self.trace_changes()
        with self._judging:
            if self._signals is None or self._signals[0] != signature:
                signals, note = signals_and_note(self.path)
                found = [{**signal.to_json(), "severity": SEVERITY[signal.severity]} for signal in signals]
                self._signals = signature, {"signals": found, "rules": _RULES, "note": note}
            return self._signals[1]

    # -- facts

    def _stored(self) -> dict[str, Any]:
        """Return what the index holds, without waiting for it; null: it was not made yet."""
        if not self.has_traces:
            return {"has_traces": False, "episodes": 0, "failed": 0, "trace_bytes": 0}
        ready = (self._index.store.folder / "index.sqlite").is_file() or self._refreshed > 0
        index = self.index(patience_s=0.0)
        counts = index.bounds() if ready else {}
        found = {"episodes": counts.get("episodes"), "failed": counts.get("failed"), "trace_bytes": counts.get("bytes")}
        return {"has_traces": True, **found}

    def summary(self) -> dict[str, Any]:
        """Return a row of the table of runs."""
        record = self.record
        rows = record.rows
        steps = [int(row["step"]) for row in rows]
        loss = "loss" if record.is_sft else "reward/mean"
        total = finite(record.setting("run.steps")) or _last(rows, "run/steps")
        return {
            "id": self.id,
            "name": self.name,
            "path": os.fsencode(self.path).decode("utf-8", "replace"),
            "kind": self.kind,
            "steps": max(steps, default=0),
            "total_steps": int(total) if total is not None else None,
            "live": self.live,
            "finished": self.finished,
            "started": self.started,
            "last_step_at": _mtime(self.path / METRICS_FILE),
            "reward_last": _last(rows, "reward/mean"),
            "eval_last": _last(rows, "eval/reward_mean"),
            "loss_last": _last(rows, loss) if record.is_sft else _last(rows, "train/loss"),
            "model": record.setting("model.path"),
            "algorithm": record.setting("trainer.algorithm.advantage"),
            "engine": record.setting("rollout.engine"),
            "spark": [value for value in thin(rows, "reward/mean", SPARK) if value is not None],
            **self._stored(),
        }


def _read_record(path: Path) -> RunRecord:
    try:
        return RunRecord.read(path)
    except OSError:
        return RunRecord(path, {}, {}, [])


def _last(rows: list[dict[str, Any]], key: str) -> float | None:
    return next((value for row in reversed(rows) if (value := finite(row.get(key))) is not None), None)


def _mtime(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _signature(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def _is_locked(path: Path, locks: Callable[[], str] = lambda: Path("/proc/locks").read_text()) -> bool | None:
    """Return whether a process holds the lock of a run; None if that cannot be seen from here.

    Reads the kernel's table: to try the lock would take it, for a moment, from a run that starts.
    """
    try:
        stat, holder, table = path.stat(), path.read_bytes()[:1000], locks()
    except OSError:
        return None if not Path("/proc/locks").is_file() else (False if not path.exists() else None)
    try:
        described = orjson.loads(holder)
        pid, host = str(described["pid"]), described["host"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        pid, host = "", socket.gethostname()
    if host != socket.gethostname():
        return None  # another machine's kernel knows
    device = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}"
    for line in table.splitlines():
        fields = line.split()
        place = next((field for field in fields if field.count(":") == 2), "")
        # Layered file systems show another device than `stat` does: then the holder tells.
        if place.rpartition(":")[2] == str(stat.st_ino) and (place.startswith(device) or pid in fields):
            return True
    return False
