"""The ledger and the check at ingest: each rule has a test that plants its violation and sees it caught."""

from __future__ import annotations

import struct
import zlib
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from agentloop.episode.law import check_trajectory
from agentloop.episode.ledger import TokenLedger
from agentloop.errors import TokenLawError
from agentloop.types import StopReason, Trajectory, Turn

IDS = st.lists(st.integers(0, 999), min_size=1, max_size=5)


def new_turn() -> Turn:
    return Turn(0, 0, "", StopReason.STOP)


@given(prompt=IDS, rounds=st.lists(st.tuples(IDS, IDS), max_size=6))
def test_a_ledger_always_gives_a_lawful_trajectory(
    prompt: list[int], rounds: list[tuple[list[int], list[int]]]
) -> None:
    ledger = TokenLedger()
    ledger.add_prompt(prompt)
    expected = list(prompt)
    sampled_total = 0
    for version, (sampled, observed) in enumerate(rounds):
        ledger.add_sampled(new_turn(), sampled, [-0.5] * len(sampled), [version] * len(sampled))
        ledger.add_observed(observed)
        expected += sampled + observed
        sampled_total += len(sampled)
    trajectory = ledger.trajectory()
    check_trajectory(trajectory)
    assert trajectory.token_ids == expected == ledger.token_ids
    assert trajectory.sampled_tokens == sampled_total
    for version, (turn, (sampled, _)) in enumerate(zip(trajectory.turns, rounds, strict=True)):
        assert trajectory.token_ids[turn.start : turn.end] == sampled
        assert set(trajectory.versions[turn.start : turn.end]) == {version}
    assert Trajectory.from_json(trajectory.to_json()) == trajectory


def test_a_ledger_refuses_what_has_no_order() -> None:
    ledger = TokenLedger()
    with pytest.raises(TokenLawError, match="needs a prompt"):
        ledger.add_observed([1])
    with pytest.raises(TokenLawError, match="needs a prompt"):
        ledger.add_sampled(new_turn(), [1], [-1.0], [0])
    with pytest.raises(TokenLawError, match="empty"):
        ledger.add_prompt([])
    ledger.add_prompt([1])
    with pytest.raises(TokenLawError, match="already has a prompt"):
        ledger.add_prompt([1])
    with pytest.raises(TokenLawError, match="2 sampled ids have 1 logprobs"):
        ledger.add_sampled(new_turn(), [1, 2], [-1.0], [0, 0])
    assert len(ledger) == 1


def lawful() -> Trajectory:
    return Trajectory(
        token_ids=[1, 2, 3, 4, 5],
        loss_mask=[0, 0, 1, 1, 0],
        logprobs=[None, None, -0.1, -0.2, None],
        versions=[None, None, 0, 0, None],
        prompt_length=2,
        turns=[Turn(2, 4, "", StopReason.STOP)],
    )


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("loss_mask", [0, 0, 1, 1], "loss_mask has 4 entries for 5"),
        ("logprobs", [None, None, None, -0.2, None], "position 2 has loss mask 1 and no logprob"),
        ("versions", [None, None, 0, None, None], "position 3 has loss mask 1 and no logprob or version"),
        ("logprobs", [None, None, 0.5, -0.2, None], "impossible logprob"),
        ("logprobs", [None, None, float("nan"), -0.2, None], "impossible logprob"),
        ("logprobs", [None, None, -0.1, -0.2, -0.3], "loss mask 0 but"),
        ("loss_mask", [0, 1, 1, 1, 0], "in the prompt"),
        ("prompt_length", 3, "in the prompt"),
        ("loss_mask", [0, 0, 2, 1, 0], "not 0 or 1"),
        ("prompt_length", 0, "outside 1..5"),
        ("token_ids", [1, 2, -3, 4, 5], "negative"),
        ("turns", [Turn(2, 3, "", StopReason.STOP)], "token spans"),
        ("turns", [], "token spans"),
    ],
)
def test_a_planted_violation_is_caught(field: str, value: Any, says: str) -> None:
    trajectory = lawful()
    check_trajectory(trajectory)
    setattr(trajectory, field, value)
    with pytest.raises(TokenLawError, match=says):
        check_trajectory(trajectory)


def breaks(trajectory: Trajectory) -> bool:
    """The law, turn by turn and token by token; `check` looks at whole slices first."""
    ids = trajectory.token_ids
    if not all(isinstance(token, int) for token in ids):
        return True
    end = 0
    for turn in trajectory.turns:
        if not end <= turn.start <= turn.end <= len(ids) or min(ids) < 0:
            return True
        end = turn.end
        if turn.sampled_digest != zlib.crc32(struct.pack(f"={end}q", *ids[:end])):
            return True
    spans = [i for turn in trajectory.turns for i in range(turn.start, turn.end)]
    columns = zip(trajectory.token_ids, trajectory.loss_mask, trajectory.logprobs, trajectory.versions, strict=True)
    for i, (token, mask, logprob, version) in enumerate(columns):
        if (
            token < 0
            or mask not in (0, 1)
            or (mask == 1) != (logprob is not None)
            or (mask == 1) != (version is not None)
        ):
            return True
        if logprob is not None and (i < trajectory.prompt_length or not -float("inf") < logprob <= 1e-4):
            return True
    return spans != [i for i, mask in enumerate(trajectory.loss_mask) if mask]


@settings(max_examples=400)
@given(
    turns=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=4),
    column=st.sampled_from(["token_ids", "loss_mask", "logprobs", "versions", "start", "end"]),
    place=st.integers(0, 30),
    value=st.sampled_from([None, -1, 0, 1, 2, 0.5, -0.5, float("nan"), float("inf"), -float("inf")]),
    compact=st.booleans(),
)
def test_one_changed_value_is_caught_exactly_if_it_breaks_the_law(
    turns: list[tuple[int, int]], column: str, place: int, value: Any, compact: bool
) -> None:
    ledger = TokenLedger()
    ledger.add_prompt([1, 2])
    for observed, sampled in turns:
        ledger.add_observed([3] * observed)
        ledger.add_sampled(new_turn(), [4] * sampled, [-0.5] * sampled, [7] * sampled)
    ledger.add_observed([5])
    trajectory = ledger.trajectory()
    check_trajectory(trajectory)
    if column in ("start", "end"):
        assume(trajectory.turns and isinstance(value, int))
        setattr(trajectory.turns[place % len(turns)], column, value)
    else:
        assume(value is not None or column != "loss_mask")
        whole = getattr(trajectory, column)
        entries: Any = list(whole)
        entries[place % len(entries)] = value
        if compact:
            with suppress(TypeError, ValueError):  # a value that only a list can hold
                entries = type(whole)(entries)
        setattr(trajectory, column, entries)
    if breaks(trajectory):
        with pytest.raises(TokenLawError):
            check_trajectory(trajectory)
    else:
        check_trajectory(trajectory)


@pytest.mark.parametrize("change", [{"format": 99}, {"format": None}, {"stop_reason": "boredom"}, {"surprise": 1}])
def test_a_foreign_json_form_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(TokenLawError):
        Trajectory.from_json({**lawful().to_json(), **change})


@pytest.mark.parametrize(
    ("ids", "logprobs", "error"),
    [
        ([1, 2**31], [-0.5, -0.5], TokenLawError),
        ([1, 2], [-0.5, "x"], TypeError),
        ((1, 2**31), (-0.5, -0.5), TokenLawError),
    ],
)
def test_a_refused_turn_leaves_every_column_as_it_was(ids: Any, logprobs: Any, error: type[Exception]) -> None:
    ledger = TokenLedger()
    ledger.add_prompt([7, 8, 9])
    before = ledger.digest

    with pytest.raises(error):
        ledger.add_sampled(Turn(0, 0, "", StopReason.STOP), ids, logprobs, [3, 3])

    trajectory = ledger.trajectory()
    assert len(trajectory.token_ids) == len(trajectory.loss_mask) == len(trajectory.logprobs) == 3
    assert len(trajectory.versions) == 3
    assert ledger.digest == before
