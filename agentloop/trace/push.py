"""Send what a destination of spans does not have yet, from the traces of a run."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError

from agentloop.config import ExporterConfig, OtlpConfig, SpanSampling, TraceConfig, WeaveConfig
from agentloop.config.keys import annotation_at, known_keys, nearest
from agentloop.config.messages import explain
from agentloop.config.overrides import apply_override
from agentloop.errors import ConfigError, ExportError, TraceError
from agentloop.text import HIDDEN, clean, hide_override
from agentloop.trace.backlog import Backlog, Missing
from agentloop.trace.exporting import Destination, ExportRun, TracedEpisode, load_exporter
from agentloop.trace.exports import ExportLog, RecordUnavailable
from agentloop.trace.otlp.headers import VARIABLES
from agentloop.trace.store import TraceFile

SECTIONS: dict[str, type[SpanSampling]] = {"otlp": OtlpConfig, "weave": WeaveConfig}
BUILT_IN = tuple(SECTIONS)

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

PAUSES_S = (1.0, 3.0, 10.0)
"""Pauses before a batch is sent again while the destination does not answer."""

LONG_PAUSE_S = 60.0
"""The pauses after them, if a push is to wait for its destination."""

SINGLY_S = 30.0
"""How long the episodes of a batch that failed are tried one by one while none arrives."""


@dataclass(slots=True)
class Pushed:
    """What a push did, in episodes.

    Attributes:
        sent: by this push.
        known: that were there before.
        refused: with the destination's reason.
        without_spans: of older versions; they cannot be sent.
        unread: trace files that are cut, with the reason.
    """

    sent: int = 0
    known: int = 0
    refused: list[str] = field(default_factory=list)
    without_spans: int = 0
    unread: list[str] = field(default_factory=list)


def push_destination(name: str, run_dir: Path, changes: Sequence[str] = ()) -> tuple[Destination, ExportRun]:
    """Return a destination as the run's recipe has it, with changes.

    Args:
        name: `otlp`, `weave`, or one of `trace.exporters`.
        changes: `key=value` of its section, for example `endpoint=http://127.0.0.1:4318`.

    Raises:
        ConfigError: the run has no such destination and the changes do not make one, a change is
            wrong, a header is needed that no file has, or a library is missing.
        TraceError: the directory holds no run.
    """
    recipe = _read_recipe(run_dir)
    trace = _section(recipe, "trace")
    data: dict[str, Any] = {key: trace[key] for key in (*BUILT_IN, "exporters") if trace.get(key)}
    if (place := _place(name, data)) is not None:
        for change in changes:
            change = _known_change(change, name, place)
            apply_override(data, f"{place}.{change}", TraceConfig, lambda _, value: value)
    if name == "otlp" and isinstance(data.get("otlp"), dict):
        data["otlp"]["headers"] = _known_headers(_section(data["otlp"], "headers"))

    try:
        config = TraceConfig.model_validate(data)
    except ValidationError as exc:
        lines = [_explained(error, place) for error in exc.errors()]
        raise ConfigError("; ".join(lines), "give it as key=value behind the run directory") from exc
    sections = {"otlp": config.otlp, "weave": config.weave} | {section.name: section for section in config.exporters}
    section = sections.get(name)
    if section is None:
        example = "endpoint=http://127.0.0.1:4318" if name == "otlp" else "project=my-project"
        raise ConfigError(
            f"the run {clean(run_dir, 300)} has no trace.{clean(name, 100)}",
            f"say where to send it: agentloop trace push --to {name} {clean(run_dir, 300)} {example}"
            if name in BUILT_IN
            else "name otlp or weave, or one of the run's trace.exporters",
        )
    if isinstance(section, ExporterConfig) and (hidden := _hidden_at(section.options, "options")) is not None:
        raise ConfigError(
            f"the run gave the exporter {clean(name, 100)} a value for {clean(hidden, 100)} that is in none of its "
            "files",
            f"give it behind the run directory: {clean(hidden, 100)}=VALUE",
        )
    run = ExportRun(
        str(_section(recipe, "run").get("name") or run_dir.resolve().name),
        run_dir,
        str(_section(recipe, "model").get("path") or ""),
        int(_section(recipe, "rollout").get("group_size") or 1),
        int(_section(recipe, "eval").get("n") or 1),
    )
    return Destination(name, load_exporter(name)(section, run), section), run


class Push:
    """One push of a run's traces to a destination.

    Args:
        everything: ignore the sampling of the destination's section.
        again: ignore what is noted as sent: the destination lost what it had confirmed.
        wait: while no connection can be made, try again without end.
        warn: called once for each pause while the destination does not answer.

    Attributes:
        done: what was done so far; also after an error or Ctrl-C.
    """

    def __init__(
        self,
        destination: Destination,
        run: ExportRun,
        *,
        everything: bool = False,
        again: bool = False,
        wait: bool = False,
        warn: Callable[[str], None],
    ) -> None:
        self.done = Pushed()
        self._exporter = destination.exporter
        self._wait = wait
        self._warn = warn
        self._log = ExportLog(run.folder / "traces", warn=warn)
        self._backlog = Backlog(destination, run, self._log, everything=everything, again=again, warn=warn)
        self._failed: tuple[ExportError, Sequence[TracedEpisode]] | None = None  # a batch of which nothing arrived
        self._missing: list[tuple[TraceFile, Missing]] = []

    def count(self) -> int:
        """Find what is missing there; return the number of episodes.

        Raises:
            RecordUnavailable: what is sent could not be noted: each push would send it again.
        """
        for file in self._backlog.store.files():
            try:
                missing = self._backlog.missing(file)
            except TraceError as exc:
                self.done.unread.append(exc.message)
                continue
            self.done.known += missing.known
            self.done.without_spans += missing.without_spans
            if missing.trace_ids:
                self._missing.append((file, missing))
        if self._missing:
            self._log.check_writable()
        return sum(len(missing.trace_ids) for _, missing in self._missing)

    def send(self) -> Iterator[int]:
        """Send what `count` found; yield the number of episodes that each batch settled.

        Raises:
            ExportError: the destination does not answer. What arrived until then is noted.
            RecordUnavailable: what is sent cannot be noted any more.
        """
        for file, missing in self._missing:
            try:
                for batch in self._backlog.batches(file, missing):
                    if self._send(batch):
                        yield len(batch)
            except TraceError as exc:
                self.done.unread.append(exc.message)
        if self._failed is not None:
            raise self._failed[0]

    def close(self) -> None:
        """Release the destination and the record of what was sent."""
        self._exporter.close(5.0)
        try:
            self._backlog.note()
        except RecordUnavailable as exc:
            count = len(self._backlog.unnoted)
            self._warn(
                f"{count:,} episodes arrived that could not be noted ({clean(exc.message, 300)}): the next push sends "
                "them again, under the same ids"
            )
        self._log.close()

    def _send(self, batch: Sequence[TracedEpisode]) -> bool:
        """Send a batch; return whether it is settled. If nothing of it arrives, the next one shows
        whether its episodes are the cause or the destination."""
        try:
            done = self._tried(batch)
            if done is not None:
                self._count(*done)
        finally:
            self.done.sent = self._backlog.arrived
        return done is not None

    def _tried(self, batch: Sequence[TracedEpisode]) -> tuple[int, list[ExportError]] | None:
        """Return what `Backlog.send` does, after its retries; None: nothing of the batch arrives.

        Raises:
            ExportError: no connection can be made, or nothing of the last batch arrived either.
            RecordUnavailable: what is sent cannot be noted.
        """
        for number in itertools.count():
            try:
                return self._backlog.send(batch)
            except (ExportError, RecordUnavailable) as exc:
                if (pause := self._pause(number, exc)) is None:
                    if isinstance(exc, RecordUnavailable) or exc.unreachable:
                        raise
                    break
                ends = "; Ctrl-C ends it" if self._wait else ", for the last time" * (number + 1 == len(PAUSES_S))
                self._warn(f"{clean(exc.message, 300)}; again in {pause:g} s{ends}")
                time.sleep(pause)
        try:
            return self._backlog.send_singly(batch, limit_s=SINGLY_S)
        except ExportError as exc:
            if self._failed is not None or exc.unreachable:
                raise
            self._failed = exc, batch
            return None

    def _pause(self, number: int, exc: ExportError | RecordUnavailable) -> float | None:
        """Return the pause after the failure of this number of a batch, from 0; None: give up."""
        waits = self._wait and isinstance(exc, ExportError) and exc.unreachable
        if self._failed is None and number < len(PAUSES_S):
            return PAUSES_S[number]
        return LONG_PAUSE_S if waits else None

    def _count(self, sent: int, refused: Sequence[ExportError]) -> None:
        self.done.refused += [error.message for error in refused]
        if sent and self._failed is not None:
            (_, batch), self._failed = self._failed, None
            try:
                # From the other end, since not all of them may have been tried.
                _, refused = self._backlog.send_singly(batch[::-1], limit_s=SINGLY_S)
                self.done.refused += [error.message for error in refused]
            except ExportError as exc:
                if exc.unreachable:
                    raise
                self.done.refused += [f"{episode.key}: {exc.message}" for episode in batch]


def _place(name: str, trace: Mapping[str, Any]) -> str | None:
    """Return the key of a destination's section in `trace`; None: it has none."""
    if name in BUILT_IN:
        return name
    sections = trace.get("exporters")
    for number, section in enumerate(sections if isinstance(sections, list) else ()):
        if isinstance(section, dict) and section.get("name") == name:
            return f"exporters.{number}"
    return None


def _known_change(change: str, name: str, place: str) -> str:
    """Return a change of a destination's section, without the place of that in a recipe.

    Raises:
        ConfigError: it is an address alone, or the section has no such key. The value is not shown.
    """
    if ADDRESS.match(change):
        key = "endpoint=URL" if name == "otlp" else "key=value; the address of weave is in WF_TRACE_SERVER_URL"
        raise ConfigError(f"{clean(hide_override(change), 200)!r} is not key=value", f"write {key}")
    for prefix in (f"trace.{place}.", f"{place}."):
        change = change.removeprefix(prefix)
    key, equals, _ = change.partition("=")
    section = SECTIONS.get(name, ExporterConfig)
    if equals and annotation_at(section, key.split(".")) is None:
        known = list(known_keys(section))
        raise ConfigError(
            f"trace.{place} has no key {clean(key, 200)!r}", nearest(key, known, f"its keys are {', '.join(known)}")
        )
    return change


def _explained(error: Any, place: str | None) -> str:
    """Return a line for an error; keys of a destination's section are named as it is changed."""
    parts = [] if place is None else place.split(".")
    if not parts or [str(part) for part in error["loc"][: len(parts)]] != parts:
        return explain(error, (), TraceConfig)
    section = SECTIONS.get(parts[0], ExporterConfig)
    return explain({**error, "loc": error["loc"][len(parts) :]}, list(known_keys(section)), section)


def _hidden_at(value: Any, key: str) -> str | None:
    """Return the key of the first value that is hidden in the files of a run; None: none is."""
    if isinstance(value, str):
        return key if HIDDEN in value else None
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return next((found for name, item in items if (found := _hidden_at(item, f"{key}.{name}")) is not None), None)


def _known_headers(headers: Mapping[str, Any]) -> dict[str, str]:
    """Return the headers whose values are known: a run's files hold none.

    Raises:
        ConfigError: one is hidden, and no variable gives headers instead.
    """
    hidden = [name for name, value in headers.items() if value == HIDDEN]
    if hidden and not any(os.environ.get(variable) for variable in VARIABLES):
        raise ConfigError(
            f"the run sent the header {clean(hidden[0], 80)!r}, whose value is in none of its files",
            f"set {VARIABLES[1]}={clean(hidden[0], 80)}=VALUE in the environment",
        )
    return {name: str(value) for name, value in headers.items() if value != HIDDEN}


def _read_recipe(run_dir: Path) -> dict[str, Any]:
    """Return the recipe of a run or an evaluation; empty for traces without one.

    Raises:
        TraceError: the directory does not exist or holds no traces.
    """
    if not (run_dir / "traces").is_dir():
        raise TraceError(
            f"{clean(run_dir, 300)} holds no traces", "give the directory of a run, for example outputs/quickstart"
        )
    for path, keys in ((run_dir / "config" / "resolved.json", ()), (run_dir / "eval.json", ("config",))):
        try:
            data = orjson.loads(path.read_bytes())
        except (OSError, orjson.JSONDecodeError):
            continue
        for key in keys:
            data = _section(data, key)
        if isinstance(data, dict):
            return data
    return {}


def _section(data: Any, key: str) -> dict[str, Any]:
    value = data.get(key) if isinstance(data, dict) else None
    return value if isinstance(value, dict) else {}
