"""Signals of a run directory, and of a run that goes on."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest

from agentloop.trace.record import TraceRecord
from agentloop.trace.signals import SignalWatch, judge, signals_of
from agentloop.trace.signals.evidence import WIDTH, Evidence
from agentloop.trace.signals.facts import facts_of
from agentloop.trace.signals.judge import read_rows
from agentloop.trace.store import TraceStore
from tests.agentloop.trace.signals.support import GROUPS, SAMPLES, record, row


def collapsed(step: int, *, groups: int = GROUPS) -> list[TraceRecord]:
    """A step in which every episode gives the same answer."""
    records = [record(step, group, sample) for group in range(groups) for sample in range(SAMPLES)]
    for made in records:
        made.trajectory.answer = "42"
    return records


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    store = TraceStore(tmp_path)
    lines = []
    for step in range(1, 13):
        lines.append(orjson.dumps(row(step)))
        store.write(step, "train", collapsed(step))
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b'\n{"step": 13, "reward/me')
    return tmp_path


def test_signals_of_a_run_directory_name_episodes_that_the_store_has(run_dir: Path) -> None:
    (signal,) = signals_of(run_dir)
    assert signal.rule == "repeated_answer" and signal.step == 12
    assert TraceStore(run_dir).record(signal.keys[0]).trajectory.answer == "42"
    assert orjson.loads(orjson.dumps(signal.to_json()))["keys"] == list(signal.keys)


def test_a_cut_trace_and_missing_files_are_left_out(run_dir: Path, tmp_path: Path) -> None:
    path = TraceStore(run_dir).path(12, "train")
    path.write_bytes(path.read_bytes()[:100])
    assert [signal.rule for signal in signals_of(run_dir)] == ["repeated_answer"]
    (run_dir / "metrics.jsonl").unlink()
    assert [signal.rule for signal in signals_of(run_dir)] == ["repeated_answer"]
    assert signals_of(tmp_path / "none") == []


def test_a_watch_says_each_signal_once_as_soon_as_it_can() -> None:
    watch = SignalWatch()
    said = []
    for step in range(1, 13):
        watch.add_row(row(step))
        said.append([signal.rule for signal in watch.look(step, collapsed(step))])
    assert said == [[]] * (WIDTH - 1) + [["repeated_answer"]] + [[]] * (12 - WIDTH)


def test_a_watch_is_silent_about_what_was_said_in_other_words() -> None:
    watch = SignalWatch()
    watch.said("repeated_answer")
    assert not any(watch.look(step, collapsed(step)) for step in range(1, 13))


def test_a_watch_of_a_continued_run_knows_what_was_recorded(run_dir: Path) -> None:
    watch = SignalWatch(run_dir)
    watch.add_row(row(13))
    assert [signal.step for signal in watch.look(13, collapsed(13))] == [13]


def test_a_step_is_read_up_to_whole_groups() -> None:
    facts = facts_of(1, iter(collapsed(1)), most=2 * SAMPLES + 1)
    assert len(facts.episodes) == 3 * SAMPLES


def test_the_episodes_of_a_fork_are_one_episode() -> None:
    main, fork = record(1, 0, 0), record(1, 0, 0)
    fork.parts = main.parts = 2
    main.part = 1
    (episode,) = facts_of(1, [fork, main]).episodes
    assert episode.key == main.key and len(episode.calls) == 2 and episode.tokens == 2 * 65


def test_a_real_run_that_learned_has_no_warning_at_any_of_its_steps() -> None:
    """The metrics of the quickstart, 60 steps. From step 28 on most of its groups are solved."""
    lines = read_rows(Path(__file__).with_name("quickstart.jsonl"))
    assert len(lines) == 61
    for end in range(len(lines)):
        signals = judge(Evidence(lines[: end + 1]))
        assert [signal.rule for signal in signals if signal.rule != "equal_groups"] == []
