"""`Backlog`: episodes are read back as they were, sent once, and none takes another with it."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from agentloop.config import SpanSampling
from agentloop.errors import ConfigError, ExportError, TraceError
from agentloop.trace import backlog as backlog_module
from agentloop.trace.backlog import Backlog
from agentloop.trace.exporting import Destination, ExportRun, TracedEpisode, episodes_of
from agentloop.trace.exports import ExportLog, RecordUnavailable
from agentloop.trace.file_lock import locked
from agentloop.trace.genai import named_spans
from agentloop.trace.record import TraceRecord
from agentloop.trace.store import TraceStore
from agentloop.trace.weave.calls import calls_of
from agentloop.types import MalformedCall
from tests.agentloop.trace.damaged_files import DAMAGES
from tests.agentloop.trace.made_episodes import record, step_of
from tests.agentloop.trace.made_exporter import MadeExporter, keys


@pytest.fixture
def run(tmp_path: Path) -> ExportRun:
    return ExportRun("demo", tmp_path, "models/small", rollout_n=2)


def backlog_of(run: ExportRun, exporter: MadeExporter | None = None, sampling: SpanSampling | None = None) -> Backlog:
    destination = Destination("otlp", exporter or MadeExporter(), sampling or SpanSampling())
    return Backlog(destination, run, ExportLog(run.folder / "traces"))


def read_back(run: ExportRun, *records: TraceRecord) -> list[TracedEpisode]:
    """Write records of one step, and return what a destination is to get of them."""
    first = records[0]
    TraceStore(run.folder).write(first.step, first.split, records)
    backlog = backlog_of(run)
    (file,) = backlog.store.files()
    return [episode for batch in backlog.batches(file, backlog.missing(file)) for episode in batch]


def strange() -> TraceRecord:
    made = record(7, "g/1", text="語 \ud800 <script>")
    made.trajectory.reward_parts["ratio"] = -math.inf
    made.trajectory.turns[1].malformed_calls.append(MalformedCall("<call>", "no JSON"))
    made.trajectory.messages[1]["content"] = [{"type": "image", "image": b"x"}, {"type": "text", "text": "how many?"}]
    made.trajectory.spans[2].status, made.trajectory.spans[2].error = "error", "ValueError: \ud800"
    made.trajectory.turns[0].tool_calls[0].arguments["much"] = 2**70
    return made


@pytest.mark.parametrize("made", [record(), strange(), record(split="eval")], ids=["plain", "strange", "eval"])
def test_exporters_make_the_same_of_an_episode_that_was_stored(run: ExportRun, made: TraceRecord) -> None:
    episode = TracedEpisode(run, (made,))
    (arrived,) = read_back(run, made)
    assert named_spans(arrived) == named_spans(episode)
    assert calls_of(arrived, texts=True, image=lambda _: None) == calls_of(episode, texts=True, image=lambda _: None)
    assert arrived.content == episode.content, "a resumed run recognizes it"


def test_a_fork_is_one_episode(run: ExportRun) -> None:
    first, second = record(3), record(3)
    first.parts = second.parts = 2
    second.part = 1
    first.trajectory.trace_id, first.trajectory.spans = "", []  # they are the main trajectory's
    episode = TracedEpisode(run, (first, second))
    (arrived,) = read_back(run, first, second)
    assert (arrived.trace_id, arrived.key, len(arrived.records)) == (episode.trace_id, episode.key, 2)
    assert named_spans(arrived) == named_spans(episode)


def test_batches_hold_the_groups_that_are_chosen_in_order(run: ExportRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog_module, "BATCH", 4)
    TraceStore(run.folder).write(1, "train", step_of(1, 9))
    backlog = backlog_of(run, sampling=SpanSampling(max_groups_per_step=5))
    (file,) = backlog.store.files()
    missing = backlog.missing(file)
    batches = list(backlog.batches(file, missing))
    assert [len(batch) for batch in batches] == [4, 4, 2] and len(missing.trace_ids) == 10
    found = [episode.key for batch in batches for episode in batch]
    groups = dict.fromkeys(key.rsplit("/", 1)[0] for key in found)
    assert found == [f"{group}/{sample}" for group in groups for sample in (0, 1)]
    backlog.send(batches[0])
    after = backlog.missing(file)
    assert after.known == 4 and after.trace_ids == {episode.trace_id for batch in batches[1:] for episode in batch}


def test_batches_of_long_episodes_hold_fewer(run: ExportRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog_module, "BATCH_TOKENS", 50)
    TraceStore(run.folder).write(1, "train", step_of(1, 4))
    backlog = backlog_of(run)
    (file,) = backlog.store.files()
    batches = list(backlog.batches(file, backlog.missing(file)))
    assert [len(batch) for batch in batches] == [3, 3, 2], "episodes of 20 tokens"


def test_what_failed_one_by_one_as_an_outage_ended_is_sent_once_more(run: ExportRun) -> None:
    class Returning(MadeExporter):
        """Is away for the first two episodes that are tried."""

        calls = 0

        def export(self, episodes: Sequence[TracedEpisode]) -> None:
            self.calls += 1
            self.down = self.calls <= 2
            super().export(episodes)

    exporter = Returning()
    batch = list(episodes_of(run, step_of(1, 2)))
    assert backlog_of(run, exporter).send_singly(batch) == (4, [])
    assert sorted(exporter.got) == sorted(keys(1, groups=2))


@pytest.mark.parametrize("error", [ExportError("here answered 400", final=True), KeyError("role")])
def test_an_episode_that_is_refused_or_cannot_be_converted_takes_no_other_with_it(
    run: ExportRun, error: Exception
) -> None:
    class Choosy(MadeExporter):
        def export(self, episodes: Sequence[TracedEpisode]) -> None:
            if any(episode.key == "train/1/1-1/0" for episode in episodes):
                raise error
            super().export(episodes)

    exporter = Choosy()
    sent, (refused,) = backlog_of(run, exporter).send(list(episodes_of(run, step_of(1, 3))))
    assert sent == 5 and exporter.got == [key for key in keys(1, groups=3) if key != "train/1/1-1/0"]
    assert ("here answered 400" if isinstance(error, ExportError) else "KeyError: 'role'") in refused.message


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (ExportError("gone", "start it"), ExportError, "gone"),
        (ConfigError("no key", "set it"), ConfigError, "no key"),
        (MemoryError(), ExportError, "more memory than there is"),
    ],
)
def test_what_is_wrong_with_the_destination_ends_a_batch_at_once(
    run: ExportRun, error: Exception, kind: type[Exception], words: str
) -> None:
    class Away(MadeExporter):
        calls = 0

        def export(self, episodes: Sequence[TracedEpisode]) -> None:
            self.calls += 1
            raise error

    exporter = Away()
    backlog = backlog_of(run, exporter)
    with pytest.raises(kind, match=words) as caught:
        backlog.send(list(episodes_of(run, step_of(1, 3))))
    assert exporter.calls == 1 and not getattr(caught.value, "final", False)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_file_that_is_damaged_behind_its_footer_is_named(run: ExportRun, damage: Callable[[Path], None]) -> None:
    store = TraceStore(run.folder)
    store.write(1, "train", step_of(1, 2))
    damage(store.path(1, "train"))
    backlog = backlog_of(run)
    (file,) = backlog.store.files()
    with pytest.raises(TraceError, match=r"step_1/train\.parquet"):
        backlog.missing(file)


def test_nothing_is_sent_that_cannot_be_noted(run: ExportRun, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = MadeExporter()
    backlog = backlog_of(run, exporter)

    def full(*_: object) -> None:
        raise RecordUnavailable("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(ExportLog, "check_writable", full)
        with pytest.raises(RecordUnavailable, match="the disk is full"):
            backlog.send(list(episodes_of(run, step_of(1, 2))))
    assert not exporter.got and not backlog.unnoted
    assert backlog.send(list(episodes_of(run, step_of(1, 2)))) == (4, [])


def test_what_arrived_as_the_disk_became_full_is_noted_later_and_not_sent_again(
    run: ExportRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = MadeExporter()
    backlog = backlog_of(run, exporter)
    made = step_of(1, 3)
    TraceStore(run.folder).write(1, "train", made)
    (file,) = backlog.store.files()
    episodes = list(episodes_of(run, made))
    first, rest = batches = [episodes[:4], episodes[4:]]
    mark = ExportLog.mark

    def full(self: ExportLog, destination: str, episodes: Any) -> None:
        if list(episodes):
            raise RecordUnavailable("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(ExportLog, "mark", full)
        assert backlog.send(first) == (4, []), "it arrived"
        assert backlog.unnoted == [episode.trace_id for episode in first]
        assert backlog.missing(file).trace_ids == {episode.trace_id for episode in rest}
        for batch in batches:
            with pytest.raises(RecordUnavailable):
                backlog.send(batch)
    assert ExportLog.mark is mark and backlog.send(first) == (0, [])
    assert not backlog.unnoted and ExportLog(run.folder / "traces").counts() == {"otlp here": 4}
    assert backlog.send(rest) == (2, []) and exporter.got == keys(1, groups=3)


def test_two_that_send_at_once_send_each_episode_once(run: ExportRun) -> None:
    exporter = MadeExporter()
    exporter.hold.clear()
    counts: list[int] = []

    def send() -> None:
        counts.append(backlog_of(run, exporter).send(list(episodes_of(run, step_of(1, 2))))[0])

    threads = [threading.Thread(target=send) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert exporter.tried.wait(10)
    exporter.hold.set()
    for thread in threads:
        thread.join()
    assert sorted(counts) == [0, 0, 4] and exporter.got == keys(1, groups=2)


def test_who_holds_a_destination_and_stands_still_is_named_once_and_not_waited_for_again(
    run: ExportRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog_module, "TURN_S", 0.1)
    said: list[str] = []
    exporter = MadeExporter()
    destination = Destination("otlp", exporter, SpanSampling())
    backlog = Backlog(destination, run, ExportLog(run.folder / "traces"), warn=said.append)
    first, second = (list(episodes_of(run, step_of(step, 1))) for step in (1, 2))
    backlog.send(first)
    (path,) = (run.folder / "traces").glob("exports.*.lock")
    with locked(path, 1):
        backlog.send(second)
        monkeypatch.setattr(backlog_module, "TURN_S", 1000)
        backlog.send(list(episodes_of(run, step_of(3, 1))))
    (text,) = said
    assert f"process {os.getpid()} on " in text and str(path) in text and "end it" in text
    assert exporter.got == keys(1, 2, 3, groups=1)


def test_an_episode_without_an_entry_takes_no_other_with_it(run: ExportRun) -> None:
    batch = list(episodes_of(run, step_of(1, 2)))
    batch[1].main.trajectory.token_ids = ["odd"]
    exporter = MadeExporter()
    sent, (refused,) = backlog_of(run, exporter).send(batch)
    assert sent == 3 and refused.message.startswith("train/1/1-0/1: ValueError")
