"""`TraceHub`: sends once, waits out an outage, bounds what waits, ends in time, says what is missing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from agentloop.config import SpanSampling, TraceConfig
from agentloop.errors import ConfigError, ExportError, RegistryError
from agentloop.trace import hub as hub_module
from agentloop.trace.exporting import Destination, ExportRun, TracedEpisode, episodes_of, load_destinations, sampled
from agentloop.trace.exports import ExportLog
from agentloop.trace.hub import TraceHub, address_of
from tests.agentloop.trace.made_episodes import record, step_of


class Receiver:
    """An exporter that keeps what it gets; `down` and `refuses` make it fail."""

    destination = "here"

    def __init__(self) -> None:
        self.got: list[str] = []
        self.down = False
        self.refuses: Callable[[TracedEpisode], bool] = lambda _: False
        self.hold = threading.Event()
        self.hold.set()
        self.tried = threading.Event()
        self.closed = 0

    def export(self, episodes: Sequence[TracedEpisode]) -> None:
        self.tried.set()
        self.hold.wait(30)
        if self.down:
            raise ExportError("here cannot be reached")
        if any(self.refuses(episode) for episode in episodes):
            raise ExportError("here answered 400", final=True)
        self.got += [episode.key for episode in episodes]

    def close(self, timeout_s: float) -> None:
        self.closed += 1


@pytest.fixture
def run(tmp_path: Path) -> ExportRun:
    return ExportRun("demo", tmp_path, "m", rollout_n=2)


def make(
    run: ExportRun, receiver: Receiver, *, queue_mb: int = 100, sampling: SpanSampling | None = None
) -> tuple[TraceHub, list[str]]:
    said: list[str] = []
    destination = Destination("otlp", receiver, sampling or SpanSampling())
    return TraceHub([destination], run, queue_mb=queue_mb, warn=said.append), said


def keys(*steps: int, groups: int, samples: int = 2) -> list[str]:
    return [f"train/{s}/{s}-{g}/{n}" for s in steps for g in range(groups) for n in range(samples)]


def test_every_episode_of_every_step_is_sent_once_and_noted(run: ExportRun) -> None:
    receiver = Receiver()
    hub, said = make(run, receiver)
    first = step_of(1, 20)
    hub.submit(first)
    hub.submit(step_of(2, 20))
    counts = hub.close()["otlp"]
    assert receiver.got == keys(1, 2, groups=20) and not said and receiver.closed == 1
    assert (counts.sent, counts.missing) == (80, 0)

    again, _ = make(run, receiver)
    again.submit(first)
    assert again.close()["otlp"].sent == 0 and len(receiver.got) == 80
    log = ExportLog(run.folder / "traces")
    assert log.counts() == {"otlp here": 80}


def test_what_a_resumed_run_samples_again_is_sent_only_if_it_differs(run: ExportRun) -> None:
    receiver = Receiver()
    hub, _ = make(run, receiver)
    hub.submit(step_of(1, 3))
    assert hub.close()["otlp"].sent == 6

    again = step_of(1, 3)
    for number, one in enumerate(again):
        one.trajectory.trace_id = f"{number + 1:032x}"
    other = again[4].trajectory
    other.token_ids = [*list(other.token_ids)[:-1], int(other.token_ids[-1]) + 1]
    hub, said = make(run, receiver)
    hub.submit(again)
    assert hub.close()["otlp"].sent == 1 and receiver.got[6:] == [keys(1, groups=3)[4]] and not said
    known = ExportLog(run.folder / "traces").sent("otlp here", [one.trajectory.trace_id for one in again])
    assert len(known) == 6, "and push sends none of them"


def test_an_outage_loses_nothing_that_fits_and_is_said_once(run: ExportRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(hub_module, "LONGEST_PAUSE_S", 0.02)
    receiver = Receiver()
    receiver.down = True
    hub, said = make(run, receiver)
    for step in (1, 2, 3):
        receiver.tried.clear()
        hub.submit(step_of(step, 4))
        assert receiver.tried.wait(10)
    receiver.down = False
    assert hub.close()["otlp"].missing == 0
    # Once each; those that failed one by one as the outage ended come after the others.
    assert sorted(receiver.got) == sorted(keys(1, 2, 3, groups=4))
    assert len(said) == 1 and "cannot be reached" in said[0] and "agentloop trace push --to otlp" in said[0]


def test_what_a_full_queue_leaves_out_is_counted_and_said_once(run: ExportRun) -> None:
    receiver = Receiver()
    receiver.hold.clear()
    hub, said = make(run, receiver, queue_mb=1)
    big = [record(1, "a", n, text="x" * 300_000) for n in range(5)]
    hub.submit(big)
    hub.submit([record(2, "b", n, text="x" * 300_000) for n in range(5)])
    hub.submit([])
    receiver.hold.set()
    counts = hub.close()["otlp"]
    assert counts.sent + counts.dropped == 10 and 0 < counts.sent < 5
    assert sum("slower than the run" in text for text in said) == 1
    assert f"{counts.dropped} episodes were not sent" in said[-1] and str(run.folder) in said[-1]


def test_the_end_of_a_run_waits_only_so_long(run: ExportRun) -> None:
    receiver = Receiver()
    receiver.hold.clear()
    hub, said = make(run, receiver)
    hub.submit(step_of(1, 2))
    begin = time.monotonic()
    counts = hub.close(0.1)["otlp"]
    assert time.monotonic() - begin < 20  # not the 30 s of the receiver
    assert (counts.sent, counts.waiting) == (0, 4) and "4 episodes were not sent" in said[-1]
    receiver.hold.set()


def test_an_episode_that_is_refused_takes_no_other_with_it(run: ExportRun) -> None:
    receiver = Receiver()
    receiver.refuses = lambda episode: episode.key == "train/1/1-1/0"
    hub, said = make(run, receiver)
    hub.submit(step_of(1, 3))
    counts = hub.close()["otlp"]
    assert (counts.sent, counts.refused) == (5, 1) and "train/1/1-1/0" not in receiver.got
    assert "answered 400" in said[0]


def test_what_failed_one_by_one_as_an_outage_ended_is_sent_once_more(run: ExportRun) -> None:
    class Returning(Receiver):
        """Is away for the first two episodes that are tried."""

        calls = 0

        def export(self, episodes: Sequence[TracedEpisode]) -> None:
            self.calls += 1
            self.down = self.calls <= 2
            super().export(episodes)

    receiver = Returning()
    batch = episodes_of(run, step_of(1, 2))
    log = ExportLog(run.folder / "traces")
    assert hub_module.send_singly(Destination("otlp", receiver, SpanSampling()), log, "here", batch) == (4, [])
    assert sorted(receiver.got) == sorted(keys(1, groups=2))


def test_what_waits_at_the_end_of_a_run_is_sent_by_an_exporter_that_was_told_of_the_end(run: ExportRun) -> None:
    class Patient(Receiver):
        """Sends only when the run has ended."""

        def finish(self) -> None:
            self.hold.set()

    receiver = Patient()
    receiver.hold.clear()
    hub, said = make(run, receiver)
    hub.submit(step_of(1, 3))
    receiver.tried.wait(30)
    assert not receiver.got
    assert hub.close(timeout_s=30)["otlp"].missing == 0
    assert receiver.got == keys(1, groups=3) and not said


def test_a_broken_exporter_does_not_end_the_run(run: ExportRun) -> None:
    class Broken(Receiver):
        def export(self, episodes: Sequence[TracedEpisode]) -> None:
            raise TypeError("a bug")

    hub, said = make(run, Broken())
    hub.submit(step_of(1, 2))
    assert hub.close()["otlp"].refused == 4 and "TypeError: a bug" in said[0]


def test_without_destinations_nothing_happens(run: ExportRun) -> None:
    hub = TraceHub(load_destinations(TraceConfig(), run), run, queue_mb=1, warn=lambda text: pytest.fail(text))
    hub.submit(step_of(1, 2))
    assert not hub.active and hub.close() == {} and not (run.folder / "traces").exists()


def test_sampling_takes_whole_groups_and_is_the_same_again(run: ExportRun) -> None:
    episodes = episodes_of(run, step_of(1, 200) + step_of(2, 200))
    half = sampled(episodes, SpanSampling(sample_rate=0.5))
    assert half == sampled(episodes, SpanSampling(sample_rate=0.5))
    groups = {(e.main.step, e.main.trajectory.group_id) for e in half}
    assert len(half) == 2 * len(groups) and 150 < len(groups) < 250
    few = sampled(episodes, SpanSampling(sample_rate=0.5, max_groups_per_step=3))
    assert [sum(e.main.step == step for e in few) for step in (1, 2)] == [6, 6]
    assert {e.key for e in few} <= {e.key for e in half}
    assert sampled(episodes, SpanSampling(sample_rate=0.0)) == []
    assert sampled(episodes, SpanSampling()) == episodes
    # A part of a step is sampled as the whole was, where only the rate counts.
    assert [e.key for e in sampled(episodes[:100], SpanSampling(sample_rate=0.5))] == [
        e.key for e in half if e in episodes[:100]
    ]


def test_the_attributes_are_those_of_the_step(run: ExportRun) -> None:
    train, evaluated = episodes_of(run, [record(7, "g", 1), record(7, "e0", 0, split="eval")])
    assert train.attributes() == {
        "step": 7,
        "version": 6,
        "sample_index": 1,
        "rollout_n": 2,
        "group_id": "g",
        "validate": False,
        "experiment_name": "demo",
        "agent_name": "tool_agent",
        "task_id": "task g",
        "status": "ok",
    }
    assert evaluated.attributes()["validate"] is True and evaluated.attributes()["rollout_n"] == 1
    assert train.key == "train/7/g/1" and len(train.trace_id) == 32


def test_unknown_and_missing_exporters_are_refused(run: ExportRun, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RegistryError, match="nowhere"):
        load_destinations(TraceConfig(exporters=[{"name": "nowhere"}]), run)  # type: ignore[list-item]
    config = TraceConfig(otlp={"endpoint": "http://127.0.0.1:4318"})  # type: ignore[arg-type]
    (destination,) = load_destinations(config, run)
    assert address_of(destination) == "otlp http://127.0.0.1:4318/v1/traces"
    assert load_destinations(config, run, only="weave") == []
    monkeypatch.setattr("agentloop.trace.otlp.OtlpExporter.library", "not_installed.at_all")
    with pytest.raises(ConfigError, match=r"pip install 'agentloop-rl\[otlp\]'"):
        load_destinations(config, run)


def test_an_episode_that_always_fails_does_not_hold_up_the_others(
    run: ExportRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "FIRST_PAUSE_S", 0.01)
    done = threading.Event()

    class Poisoned(Receiver):
        def export(self, episodes: Sequence[TracedEpisode]) -> None:
            if any(episode.key == "train/1/1-1/0" for episode in episodes):
                raise ExportError("here answered 500")
            super().export(episodes)
            if any(episode.main.step == 2 for episode in episodes):
                done.set()

    receiver = Poisoned()
    hub, said = make(run, receiver)
    hub.submit(step_of(1, 8))
    hub.submit(step_of(2, 3))
    assert done.wait(20)
    counts = hub.close()["otlp"]
    assert (counts.sent, counts.refused, counts.waiting) == (21, 1, 0)
    assert "train/1/1-1/0" not in receiver.got and len(set(receiver.got)) == len(receiver.got) == 21
    assert any("train/1/1-1/0: here answered 500" in text for text in said)


@pytest.mark.parametrize("content", [b"no database " * 100, b"SQLite format 3\0" + b"x" * 5000])
def test_a_damaged_record_of_exports_is_moved_aside(run: ExportRun, content: bytes) -> None:
    path = run.folder / "traces" / "exports.sqlite"
    path.parent.mkdir()
    path.write_bytes(content)
    hub, said = make(run, Receiver())
    hub.submit(step_of(1, 2))
    assert hub.close()["otlp"].sent == 4
    assert path.with_name("exports.sqlite.damaged").read_bytes() == content
    assert len(said) == 1 and "exports.sqlite.damaged" in said[0]
    assert ExportLog(path.parent).counts() == {"otlp here": 4}
