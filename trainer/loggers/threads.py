"""Run each logger in its own thread: the event loop queues a step's metrics and does not wait."""

from __future__ import annotations

import importlib.util
import inspect
import math
import queue
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentloop.config import LoggerConfig
from agentloop.errors import ConfigError, UserError
from agentloop.registry import LOGGERS, load
from trainer.loggers.base import LoggerRun, MetricLogger

MAX_QUEUED = 1000
"""Maximum steps queued for one logger; further steps are dropped with a warning."""

OPEN_TIMEOUT_S = 120.0
FLUSH_TIMEOUT_S = 60.0

Factory = Callable[..., MetricLogger]


def check_loggers(configs: Sequence[LoggerConfig]) -> list[Factory]:
    """Load the classes that `loggers` names. Opens nothing and imports no logger's library.

    Raises:
        RegistryError: no such logger is registered, or it cannot be loaded.
        ConfigError: its library is not installed, or an option is unknown.
    """
    factories = []
    for config in configs:
        factory = load(LOGGERS, config.name)
        library = getattr(factory, "library", None)
        if library is not None and importlib.util.find_spec(library) is None:
            raise ConfigError(
                f"loggers: {config.name} needs the library {library!r}, which is not installed",
                f"pip install {library}",
            )
        try:
            inspect.signature(factory).bind(None, **config.options)
        except TypeError as exc:
            raise ConfigError(f"loggers: {config.name}: {exc}", "correct its options") from exc
        factories.append(factory)
    return factories


@dataclass(frozen=True)
class _Close:
    failed: bool


class LoggerThread:
    """One logger and its thread. A failure there is reported once and never stops the run.

    Args:
        make: constructs the logger; called in the thread.
        warn: called in the thread with a message for the user.
        queued: steps queued at most.
    """

    def __init__(
        self, name: str, make: Callable[[], MetricLogger], warn: Callable[[str], None], queued: int = MAX_QUEUED
    ) -> None:
        self.name = name
        self.where: str | None = None
        self._make = make
        self._warn = warn
        self._inbox: queue.Queue[tuple[int, dict[str, float]] | _Close] = queue.Queue(queued)
        self._opened = threading.Event()
        self._error: BaseException | None = None
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=self._work, name=f"logger {name}", daemon=True)
        self._thread.start()

    def wait_open(self, timeout_s: float) -> None:
        """Wait until the logger is constructed.

        Raises:
            ConfigError: that failed, or took too long.
        """
        if not self._opened.wait(timeout_s):
            raise ConfigError(
                f"loggers: {self.name} was not ready after {timeout_s:.0f} s",
                "check its server, or remove it from loggers",
            )
        if isinstance(self._error, UserError):
            raise self._error
        if self._error is not None:
            raise ConfigError(
                f"loggers: {self.name} cannot be opened: {_first_line(self._error)}",
                "correct its options or your login (docs/metrics.md), or remove it from loggers",
            ) from self._error

    def put(self, step: int, metrics: dict[str, float]) -> None:
        """Queue a step's metrics; never waits."""
        try:
            self._inbox.put_nowait((step, metrics))
        except queue.Full:
            self._warn_once("full", f"logger {self.name} is too slow or hangs: steps from {step} on are missing there")

    def close(self, *, failed: bool, timeout_s: float) -> None:
        """Wait until everything is written, at most `timeout_s`."""
        end = time.monotonic() + timeout_s
        try:
            self._inbox.put(_Close(failed), timeout=timeout_s)
            self._thread.join(max(0.0, end - time.monotonic()))
        except queue.Full:
            pass
        if self._thread.is_alive():
            self._warn(f"logger {self.name} did not finish writing within {timeout_s:.0f} s")

    def _work(self) -> None:
        try:
            logger = self._make()
            self.where = getattr(logger, "where", None)
        except BaseException as exc:  # noqa: BLE001  # a library may call sys.exit; that ends only this thread
            self._error = exc
            return
        finally:
            self._opened.set()

        while True:
            item = self._inbox.get()
            try:
                if isinstance(item, _Close):
                    logger.close(failed=item.failed)
                    return
                logger.log(*item)
            except BaseException as exc:  # noqa: BLE001  # as above; a logger never stops a run
                self._warn_once("log", f"logger {self.name} failed; the run continues without it: {_first_line(exc)}")
                if isinstance(item, _Close):
                    return

    def _warn_once(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            self._warn(text)


class Loggers:
    """All loggers of a run.

    Args:
        configs: section `loggers` of the recipe.
        root: run directory; each logger gets the folder `loggers/<name>` in it.
        warn: called in the caller's thread, from `log` and `close`.

    Attributes:
        destinations: for each logger that says so, its name and where its metrics can be seen.

    Raises:
        UserError: see `check_loggers`; or a logger cannot be opened.
    """

    def __init__(
        self,
        configs: Sequence[LoggerConfig],
        *,
        name: str,
        config: dict[str, Any],
        root: Path,
        resumed_at: int | None,
        warn: Callable[[str], None],
        open_timeout_s: float = OPEN_TIMEOUT_S,
        flush_timeout_s: float = FLUSH_TIMEOUT_S,
    ) -> None:
        self._warn = warn
        self._flush_timeout_s = flush_timeout_s
        self._warnings: deque[str] = deque()
        self._threads: list[LoggerThread] = []

        folder = root / "loggers"
        if resumed_at is None:
            shutil.rmtree(folder, ignore_errors=True)
        for number, (entry, factory) in enumerate(zip(configs, check_loggers(configs), strict=True)):
            again = sum(other.name == entry.name for other in configs[:number])
            run = LoggerRun(name, config, folder / (f"{entry.name}-{again + 1}" if again else entry.name), resumed_at)
            run.folder.mkdir(parents=True, exist_ok=True)
            self._threads.append(LoggerThread(entry.name, _maker(factory, run, entry.options), self._warnings.append))

        try:
            for thread in self._threads:
                thread.wait_open(open_timeout_s)
        except UserError:
            self.close(failed=True)
            raise
        self.destinations = [f"{thread.name}: {thread.where}" for thread in self._threads if thread.where]

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Send a line of `metrics.jsonl` to all loggers: its finite numbers, same keys."""
        numbers = {key: float(value) for key, value in metrics.items() if key != "step" and _is_number(value)}
        for thread in self._threads:
            thread.put(int(metrics["step"]), numbers)
        self._report()

    def close(self, *, failed: bool) -> None:
        """Write everything and close all loggers; waits with a time limit."""
        threads, self._threads = self._threads, []
        for thread in threads:
            thread.close(failed=failed, timeout_s=self._flush_timeout_s)
        self._report()

    def _report(self) -> None:
        while self._warnings:
            self._warn(self._warnings.popleft())


def _maker(factory: Factory, run: LoggerRun, options: dict[str, Any]) -> Callable[[], MetricLogger]:
    return lambda: factory(run, **options)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _first_line(exc: BaseException) -> str:
    lines = str(exc).strip().splitlines()
    return f"{type(exc).__name__}: {lines[0][:300]}" if lines else type(exc).__name__
