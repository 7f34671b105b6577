"""`Delivery`: sends trace files once, waits out an outage, ends in time, says what does not arrive."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from agentloop.config import SpanSampling
from agentloop.errors import ConfigError, ExportError
from agentloop.trace.exporting import Destination, ExportRun, TracedEpisode
from agentloop.trace.exports import ExportLog, RecordUnavailable
from agentloop.trace.record import TraceRecord
from agentloop.trace.sender import delivery as delivery_module
from agentloop.trace.sender.delivery import Delivery
from agentloop.trace.store import TraceStore
from tests.agentloop.trace.damaged_files import DAMAGES
from tests.agentloop.trace.made_episodes import step_of
from tests.agentloop.trace.made_exporter import MadeExporter, keys


class Run:
    """A run directory, and one destination with what its thread told."""

    def __init__(self, folder: Path) -> None:
        self.of = ExportRun("demo", folder, "m", rollout_n=2)
        self.store = TraceStore(folder)
        self.told: list[dict[str, Any]] = []
        self.deliveries: list[Delivery] = []

    def start(self, exporter: MadeExporter, busy_timeout_s: float = 10) -> Delivery:
        log = ExportLog(self.store.folder, busy_timeout_s=busy_timeout_s)
        self.deliveries.append(Delivery(Destination("otlp", exporter, SpanSampling()), self.of, log, self.told.append))
        return self.deliveries[-1]

    def write(self, step: int, records: Sequence[TraceRecord]) -> None:
        self.store.write(step, "train", records)
        self.deliveries[-1].put(step, "train")

    def end(self, timeout_s: float = 30) -> None:
        self.deliveries[-1].finish()
        self.deliveries[-1].join(timeout_s)

    @property
    def said(self) -> list[str]:
        return [message["say"] for message in self.told if "say" in message]

    @property
    def done(self) -> list[int]:
        return [message["step"] for message in self.told if "done" in message]

    def sent(self) -> int:
        return ExportLog(self.store.folder).counts().get("otlp here", 0)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path)
    yield made
    made.end(0)


def test_every_episode_of_every_step_is_sent_once_and_noted(run: Run) -> None:
    exporter = MadeExporter()
    run.start(exporter)
    first = step_of(1, 20)
    run.write(1, first)
    run.write(2, step_of(2, 20))
    run.end()
    assert exporter.got == keys(1, 2, groups=20) and not run.said and exporter.closed == 1
    assert run.done == [1, 2] and run.sent() == 80

    run.start(exporter)
    run.write(1, first)
    run.end()
    assert run.done == [1, 2, 1] and len(exporter.got) == run.sent() == 80


def test_what_a_resumed_run_samples_again_is_sent_only_if_it_differs(run: Run) -> None:
    exporter = MadeExporter()
    run.start(exporter)
    run.write(1, step_of(1, 3))
    run.end()
    assert run.sent() == 6

    again = step_of(1, 3)
    for number, one in enumerate(again):
        one.trajectory.trace_id = f"{number + 1:032x}"
    other = again[4].trajectory
    other.token_ids = [*list(other.token_ids)[:-1], int(other.token_ids[-1]) + 1]
    run.start(exporter)
    run.write(1, again)
    run.end()
    assert exporter.got[6:] == [keys(1, groups=3)[4]] and not run.said
    known = ExportLog(run.store.folder).sent("otlp here", [one.trajectory.trace_id for one in again])
    assert len(known) == 6, "and push sends none of them"


def test_an_outage_loses_nothing_and_is_said_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery_module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(delivery_module, "LONGEST_PAUSE_S", 0.02)
    exporter = MadeExporter()
    exporter.down = True
    run.start(exporter)
    for step in (1, 2, 3):
        exporter.tried.clear()
        run.write(step, step_of(step, 4))
        assert exporter.tried.wait(10)
    assert run.done == []
    exporter.down = False
    run.end()
    # Once each; those that failed one by one as the outage ended come after the others.
    assert sorted(exporter.got) == sorted(keys(1, 2, 3, groups=4)) and run.done == [1, 2, 3]
    (said,) = run.said
    assert "cannot be reached" in said and "agentloop trace push --to otlp" in said and str(run.of.folder) in said


def test_an_attempt_that_the_end_finds_under_way_is_tried_once_more(run: Run) -> None:
    class ComesBack(MadeExporter):
        attempts = 0

        def export(self, episodes: Sequence[TracedEpisode]) -> None:
            self.attempts += 1
            self.down = self.attempts == 1
            super().export(episodes)

    exporter = ComesBack()
    exporter.hold.clear()
    run.start(exporter)
    run.write(1, step_of(1, 2))
    assert exporter.tried.wait(10)
    run.deliveries[-1].finish()
    exporter.hold.set()
    run.end()
    assert run.done == [1] and exporter.got == keys(1, groups=2)


def test_the_end_of_a_run_waits_only_so_long(run: Run) -> None:
    exporter = MadeExporter()
    exporter.hold.clear()
    run.start(exporter)
    run.write(1, step_of(1, 2))
    begin = time.monotonic()
    run.end(0.1)
    assert time.monotonic() - begin < 20  # not the 30 s of the exporter
    assert exporter.closed == 1 and run.done == [] and run.sent() == 0
    exporter.hold.set()


def test_an_outage_at_the_end_of_a_run_is_not_waited_out(run: Run) -> None:
    exporter = MadeExporter()
    exporter.down = True
    run.start(exporter)
    run.write(1, step_of(1, 2))
    run.write(2, step_of(2, 2))
    assert exporter.tried.wait(10)
    begin = time.monotonic()
    run.end(60)
    assert time.monotonic() - begin < 20  # it ends at the next failure
    assert run.done == [] and "cannot be reached" in run.said[0]


def test_an_episode_that_is_refused_takes_no_other_with_it(run: Run) -> None:
    exporter = MadeExporter()
    exporter.refuses = lambda episode: episode.key == "train/1/1-1/0"
    run.start(exporter)
    run.write(1, step_of(1, 3))
    run.write(2, step_of(2, 1))
    run.end()
    assert run.sent() == 7 and "train/1/1-1/0" not in exporter.got
    assert run.done == [2], "the run counts what is missing of the others"
    assert len(run.said) == 1 and "answered 400" in run.said[0]


def test_a_broken_exporter_does_not_stop_the_steps_after(run: Run) -> None:
    class Broken(MadeExporter):
        def export(self, episodes: Sequence[TracedEpisode]) -> None:
            if episodes[0].main.step == 1:
                raise TypeError("a bug")
            super().export(episodes)

    run.start(Broken())
    run.write(1, step_of(1, 2))
    run.write(2, step_of(2, 2))
    run.end()
    assert run.done == [2] and run.sent() == 4 and "TypeError: a bug" in run.said[0]


def test_a_missing_key_is_said_once_with_its_fix(run: Run) -> None:
    class Locked(MadeExporter):
        def export(self, episodes: Sequence[TracedEpisode]) -> None:
            raise ConfigError("the key is missing", "set MY_KEY")

    run.start(Locked())
    run.write(1, step_of(1, 2))
    run.write(2, step_of(2, 2))
    run.end()
    assert run.done == [] and len(run.said) == 1 and "the key is missing" in run.said[0] and "set MY_KEY" in run.said[0]


def held_at_its_first_file(run: Run) -> MadeExporter:
    """Start an exporter that has begun step 1, and goes on when `hold` is set."""
    exporter = MadeExporter()
    exporter.hold.clear()
    run.start(exporter)
    run.write(1, step_of(1, 2))
    assert exporter.tried.wait(10)
    return exporter


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_file_that_cannot_be_read_is_said_and_does_not_stop_the_others(run: Run, damage: str) -> None:
    exporter = held_at_its_first_file(run)
    run.write(2, step_of(2, 2))
    path = run.store.path(2, "train")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()
    run.write(3, step_of(3, 2))
    exporter.hold.set()
    run.end()
    assert run.done == [1, 3] and exporter.got == keys(1, 3, groups=2)
    assert len(run.said) == 1 and ("step_2" in run.said[0] or "step 2" in run.said[0])


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_each_file_that_is_damaged_behind_its_footer_is_said(run: Run, damage: Any) -> None:
    exporter = held_at_its_first_file(run)
    for step in (2, 3):
        run.write(step, step_of(step, 2))
        damage(run.store.path(step, "train"))
    run.write(4, step_of(4, 2))
    exporter.hold.set()
    run.end()
    assert run.done == [1, 4] and exporter.got == keys(1, 4, groups=2)
    assert len(run.said) == 2 and "step_2" in run.said[0] and "step_3" in run.said[1]


def test_a_record_that_is_locked_delays_and_loses_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery_module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(delivery_module, "LONGEST_PAUSE_S", 0.02)
    exporter = MadeExporter()
    run.start(exporter, busy_timeout_s=0.01)
    run.write(1, step_of(1, 2))
    deadline = time.monotonic() + 30
    while run.done != [1] and time.monotonic() < deadline:
        time.sleep(0.01)
    other = sqlite3.connect(run.store.folder / "exports.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    for step in (2, 3):
        run.write(step, step_of(step, 2))
    while not run.said and time.monotonic() < deadline:
        time.sleep(0.01)
    other.execute("COMMIT")
    other.close()
    while run.done != [1, 2, 3] and time.monotonic() < deadline:
        time.sleep(0.01)
    run.end()
    assert run.done == [1, 2, 3] and exporter.got == keys(1, 2, 3, groups=2)
    assert len(run.said) == 1 and "database is locked" in run.said[0]


def test_a_record_that_stays_locked_ends_with_the_run(run: Run) -> None:
    ExportLog(run.store.folder).check_writable()
    other = sqlite3.connect(run.store.folder / "exports.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    run.start(MadeExporter(), busy_timeout_s=0.01)
    run.write(1, step_of(1, 2))
    begin = time.monotonic()
    run.end(60)
    assert time.monotonic() - begin < 30 and run.done == [] and "database is locked" in run.said[0]
    other.close()


def test_what_arrived_and_cannot_be_noted_is_said_at_the_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: ExportLog, destination: str, episodes: Any) -> None:
        if list(episodes):
            raise RecordUnavailable("the disk is full")

    monkeypatch.setattr(ExportLog, "mark", full)
    exporter = MadeExporter()
    run.start(exporter)
    made = step_of(1, 2)
    run.write(1, made)
    run.end()
    assert run.done == [1] and exporter.got == keys(1, groups=2)
    (said,) = run.said
    assert "4 episodes arrived that could not be noted (the disk is full)" in said and "same ids" in said
    (unnoted,) = [message for message in run.told if "unnoted" in message]
    assert unnoted == {"unnoted": "otlp", "ids": [one.trajectory.trace_id for one in made]}


def test_a_damaged_file_behind_an_episode_that_always_fails_does_not_hold_it_up(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery_module, "FIRST_PAUSE_S", 0.01)
    exporter = MadeExporter()
    exporter.down = True
    run.start(exporter)
    run.write(1, step_of(1, 1, samples=1))
    assert exporter.tried.wait(10)
    for step in (2, 3):
        run.store.write(step, "train", step_of(step, 1))
    DAMAGES["column"](run.store.path(2, "train"))
    for step in (2, 3):  # not before: what waits may be read at once
        run.deliveries[-1].put(step, "train")

    def export(episodes: Sequence[TracedEpisode]) -> None:
        if episodes[0].main.step == 1:
            raise ExportError("here answered 500")
        exporter.got += [episode.key for episode in episodes]

    exporter.export = export
    deadline = time.monotonic() + 30
    while run.done != [3] and time.monotonic() < deadline:
        time.sleep(0.01)
    run.end()
    assert run.done == [3] and sorted(exporter.got) == keys(3, groups=1)


@pytest.mark.parametrize("groups", [8, 24], ids=["one batch", "two batches"])
def test_an_episode_that_always_fails_does_not_hold_up_the_others(
    run: Run, monkeypatch: pytest.MonkeyPatch, groups: int
) -> None:
    monkeypatch.setattr(delivery_module, "FIRST_PAUSE_S", 0.01)
    done = threading.Event()

    class Poisoned(MadeExporter):
        def export(self, episodes: Sequence[TracedEpisode]) -> None:
            if any(episode.key == "train/1/1-1/0" for episode in episodes):
                raise ExportError("here answered 500")
            super().export(episodes)
            if any(episode.main.step == 2 for episode in episodes):
                done.set()

    exporter = Poisoned()
    run.start(exporter)
    run.write(1, step_of(1, groups))
    run.write(2, step_of(2, 3))
    assert done.wait(20)
    run.end()
    assert run.sent() == len(exporter.got) == len(set(exporter.got)) == 2 * groups - 1 + 6
    assert "train/1/1-1/0" not in exporter.got and run.done == [2]
    assert any("train/1/1-1/0: here answered 500" in text for text in run.said)


def test_a_step_of_which_all_fails_is_left_out_when_the_next_one_arrives(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery_module, "FIRST_PAUSE_S", 0.01)

    class Poisoned(MadeExporter):
        def export(self, episodes: Sequence[TracedEpisode]) -> None:
            if any(episode.main.step == 1 for episode in episodes):
                self.tried.set()
                raise ExportError("here answered 500")
            super().export(episodes)

    exporter = Poisoned()
    run.start(exporter)
    run.write(1, step_of(1, 1))
    assert exporter.tried.wait(10)
    run.write(2, step_of(2, 2))
    deadline = time.monotonic() + 20
    while run.done != [2] and time.monotonic() < deadline:
        time.sleep(0.01)
    run.end()
    assert run.done == [2] and sorted(exporter.got) == keys(2, groups=2)
    assert any("train/1/1-0/0: here answered 500" in text for text in run.said)
