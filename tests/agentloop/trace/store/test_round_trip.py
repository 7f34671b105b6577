"""What is written is read back to the bit, whatever a model or a user's code wrote."""

from __future__ import annotations

import random
import tempfile
from collections import OrderedDict
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentloop.columns import Logprobs, LossMask, TokenIds, Versions
from agentloop.trace.record import RecordKey, TraceRecord
from agentloop.trace.store import TraceStore
from agentloop.trace.store.exact_json import dump, load
from agentloop.types import EpisodeStatus, StopReason, Trajectory
from tests.agentloop.any_trajectory import exact, trajectories
from tests.agentloop.trace.store.support import trajectory as lawful


def compact(trajectory: Trajectory) -> Trajectory:
    """The trajectory with the columns that lists are read back as."""
    kinds = {"token_ids": TokenIds, "loss_mask": LossMask, "logprobs": Logprobs, "versions": Versions}
    for name, kind in kinds.items():
        setattr(trajectory, name, kind(getattr(trajectory, name)))
    return trajectory


@given(st.lists(trajectories(), max_size=4))
@settings(max_examples=150, deadline=None)
def test_any_trajectory_is_read_back_to_the_bit(made: list[Trajectory]) -> None:
    records = [TraceRecord(7, "train", 6, part, len(made), t, row=part or None) for part, t in enumerate(made)]
    with tempfile.TemporaryDirectory() as folder:
        store = TraceStore(Path(folder))
        store.write(7, "train", records)
        read = store.records(7, "train")
        assert list(store.iterate(7, "train")) is not None
        assert store.problems() == []
    assert len(read) == len(records)
    for before, after in zip(records, read, strict=True):
        compact(before.trajectory)
        assert exact(after) == exact(before)
        assert type(after.trajectory.status) is EpisodeStatus
        assert type(after.trajectory.stop_reason) is StopReason


def test_numbers_of_the_trainer_stay_at_their_tokens(tmp_path: Path) -> None:
    mask = [0, 1, 1, 0, 1]
    trajectory = Trajectory(
        [1, 2, 3, 4, 5], mask, [None if not m else -0.5 for m in mask], [None if not m else 2 for m in mask], 1
    )
    advantages = np.array([0, 1.5, -2, 0, 3], dtype=np.float32)
    trainer = np.array([np.nan, -1, -2, np.nan, -3], dtype=np.float32)
    records = [
        TraceRecord(1, "train", 0, 0, 2, trajectory),
        TraceRecord(1, "train", 0, 1, 2, trajectory, advantages, trainer, row=12),
    ]
    store = TraceStore(tmp_path)
    store.write(1, "train", records)
    fork, main = store.records(1, "train")
    assert fork.advantages is None and fork.trainer_logprobs is None and fork.row is None
    assert main.advantages is not None and main.advantages.tolist() == advantages.tolist()
    np.testing.assert_array_equal(main.trainer_logprobs, trainer)
    assert main.row == 12 and main.is_main and not fork.is_main
    with pytest.raises(ValueError, match="does not belong to 5 tokens"):
        store.write(1, "train", [TraceRecord(1, "train", 0, 0, 1, trajectory, advantages[:3])])
    assert len(store.records(1, "train")) == 2  # the failed write left the earlier file


def test_a_token_id_that_no_column_holds_is_kept(tmp_path: Path) -> None:
    made = Trajectory([1, 2**40], [0, 1], [None, -1.0], [None, 0], 1, status=EpisodeStatus.REJECTED)
    store = TraceStore(tmp_path)
    store.write(1, "eval", [TraceRecord(1, "eval", 1, 0, 1, made)])
    (read,) = store.records(1, "eval")
    assert read.trajectory.token_ids == [1, 2**40]
    assert read.trajectory.loss_mask == [0, 1] and read.trajectory.status is EpisodeStatus.REJECTED


def test_keys(tmp_path: Path) -> None:
    rng = random.Random(0)
    assert RecordKey.parse("train/12/a/b/3/1") == ("train", 12, "a/b", 3, 1)
    for bad in ("", "train/1", "other/1/g/0/0", "train/x/g/0/0", "train/1/g/0"):
        with pytest.raises(ValueError):
            RecordKey.parse(bad)

    made = [lawful(rng, group=f"a/{group}", sample=sample) for group in range(2) for sample in range(2)]
    records = [TraceRecord(2, "train", 1, 0, 1, t) for t in made]
    store = TraceStore(tmp_path)
    store.write(2, "train", records)
    for record in records:
        assert exact(store.record(record.key).trajectory.turns) == exact(record.trajectory.turns)


def test_a_sampled_token_without_a_logprob_is_none_and_not_nan(tmp_path: Path) -> None:
    nan = float("nan")
    for column in ([None, -0.5, None, nan], [None, -0.1, None, nan]):  # float32 holds only the first exactly
        made = Trajectory([1, 2, 3, 4], [1, 1, 0, 1], column, [0, 0, None, None], 0, status=EpisodeStatus.REJECTED)
        store = TraceStore(tmp_path)
        store.write(1, "train", [TraceRecord(1, "train", 0, 0, 1, made)])
        (read,) = store.records(1, "train")
        assert isinstance(read.trajectory.logprobs, Logprobs)
        assert read.trajectory.logprobs.bits() == Logprobs(column).bits()
        assert read.trajectory.versions == [0, 0, None, None]
        ((_, table),) = store.scan(("logprobs", "logprobs64", "other"))
        assert table["other"].to_pylist() == [None], "no column is irregular"


def test_a_nan_in_a_dictionary_of_another_class_is_not_lost() -> None:
    class Odd(list[Any]):
        pass

    value = OrderedDict(a=Odd([float("nan"), 1]), b=None)
    assert repr(load(dump(value))) == "{'a': [nan, 1], 'b': None}"


def test_a_tree_whose_nodes_name_their_parent_is_written() -> None:
    """Its ways from parent to child and back would double with each level."""
    root: dict[str, Any] = {"name": "root"}
    root["children"] = [{"name": name, "parent": root, "same": [1]} for name in "ab"]
    written = load(dump({"tree": root}))["tree"]
    assert written["children"] == [{"name": name, "parent": "dict", "same": [1]} for name in "ab"]
    shared = {"x": float("nan")}
    assert repr(load(dump([shared, shared]))) == "[{'x': nan}, {'x': nan}]", "written twice"


def test_what_has_no_text_is_named_by_its_class() -> None:
    class Bad:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    class Level(Enum):
        NONE = float("nan")

    without = "(a Bad that has no text)"
    assert load(dump([Bad()])) == [without]
    assert load(dump([Bad(), "\ud800", {Bad(): 1}])) == [without, "\ud800", {without: 1}]
    assert repr(load(dump([Level.NONE]))) == "[nan]"
