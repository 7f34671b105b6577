"""The token law at ingest: what is checked of every trajectory, and of every episode, before it may be trained."""

from __future__ import annotations

import math
import zlib
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from agentloop.errors import LawRule, TokenLawError

if TYPE_CHECKING:
    from agentloop.types import Trajectory

LOGPROB_SLACK = 1e-4
"""A logprob is at most 0; engines compute in half precision and may round to a little above it."""


def extend_digest(digest: int, ids: Sequence[int]) -> int:
    """The digest of a longer sequence from that of its beginning and the new ids; 0 is that of an empty one.

    CRC-32 of the ids as 64-bit integers: it finds mistakes, and is not meant to stand an attack.
    """
    return zlib.crc32(array("q", ids), digest)


def check_trajectory(trajectory: Trajectory) -> None:
    """Check rules 1, 2 and 5 of the token law, in one pass over the ids.

    Raises:
        TokenLawError: with the rule, and the first position that breaks it.
    """
    ids = _check_columns(trajectory)
    _check_sampled(trajectory)
    _check_digests(trajectory, memoryview(ids))
    _check_step_rewards(trajectory)


def check_episode(trajectories: Sequence[Trajectory]) -> None:
    """Check each trajectory of an episode, and rule 4: no sampled turn is trained in two of them.

    Raises:
        TokenLawError: with the rule.
    """
    trained: dict[str, int] = {}
    for number, trajectory in enumerate(trajectories, 1):
        check_trajectory(trajectory)
        for turn in trajectory.turns:  # each has mask 1: check_trajectory saw to it
            if not turn.request_id or turn.start == turn.end:
                continue
            if turn.request_id in trained:
                raise TokenLawError(
                    f"the turn sampled by request {turn.request_id} has loss mask 1 twice in its episode, in "
                    f"trajectories {trained[turn.request_id]} and {number} of {len(trajectories)}",
                    "mask the history that a fork copies",
                    LawRule.TRAINED_TWICE,
                )
            trained[turn.request_id] = number


def _check_columns(trajectory: Trajectory) -> array[int]:
    """The token ids, as the integers that they all are."""
    n = len(trajectory.token_ids)
    for name in ("loss_mask", "logprobs", "versions"):
        entries = len(getattr(trajectory, name))
        if entries != n:
            raise TokenLawError(f"{name} has {entries} entries for {n} token ids", rule=LawRule.COLUMNS)
    try:
        ids = array("q", trajectory.token_ids)
    except (TypeError, OverflowError) as exc:
        raise TokenLawError(f"a token id is no integer: {exc}", rule=LawRule.COLUMNS) from exc
    if not 0 < trajectory.prompt_length <= n:
        raise TokenLawError(f"prompt_length {trajectory.prompt_length} is outside 1..{n}", rule=LawRule.EMPTY)
    return ids


def _check_sampled(trajectory: Trajectory) -> None:
    if _is_lawful(trajectory):
        return
    columns = zip(trajectory.token_ids, trajectory.loss_mask, trajectory.logprobs, trajectory.versions, strict=True)
    for i, (token, mask, logprob, version) in enumerate(columns):
        fault = None
        if token < 0:
            fault = f"token id {token} at position {i} is negative"
        elif mask == 1:
            if i < trajectory.prompt_length:
                fault = f"position {i} is in the prompt and has loss mask 1"
            elif logprob is None or version is None:
                fault = f"position {i} has loss mask 1 and no logprob or version"
            elif not math.isfinite(logprob) or logprob > LOGPROB_SLACK:
                fault = f"position {i} has the impossible logprob {logprob}"
        elif mask != 0:
            fault = f"loss mask at position {i} is {mask}, not 0 or 1"
        elif logprob is not None or version is not None:
            fault = f"position {i} has loss mask 0 and yet a logprob or version"
        if fault is not None:
            raise TokenLawError(fault, rule=LawRule.SAMPLED)
    end = 0
    for number, turn in enumerate(trajectory.turns, 1):
        if not end <= turn.start <= turn.end <= len(trajectory.token_ids):
            raise TokenLawError(
                f"turn {number} has the tokens {turn.start} to {turn.end}, and the turn before it ends at {end}",
                rule=LawRule.SAMPLED,
            )
        end = turn.end
    covered = [i for turn in trajectory.turns for i in range(turn.start, turn.end)]
    if covered != [i for i, mask in enumerate(trajectory.loss_mask) if mask]:
        raise TokenLawError(
            "the turns' token spans are not exactly the positions with loss mask 1", rule=LawRule.SAMPLED
        )


def _is_lawful(trajectory: Trajectory) -> bool:
    """What `_check_sampled` looks for, in whole slices: two fifths of its time. False says: look at each token."""
    if min(trajectory.token_ids) < 0:
        return False
    mask: list[int] = []
    end = 0
    for turn in trajectory.turns:
        if not end <= turn.start <= turn.end or not _unsampled(trajectory, end, turn.start):
            return False
        mask += [0] * (turn.start - end)
        mask += [1] * (turn.end - turn.start)
        end = turn.end
        if turn.end > turn.start and not _sampled(trajectory, turn.start, turn.end):
            return False
    length = len(trajectory.token_ids)
    mask += [0] * (length - end)
    first = trajectory.turns[0].start if trajectory.turns else trajectory.prompt_length
    return first >= trajectory.prompt_length and trajectory.loss_mask == mask and _unsampled(trajectory, end, length)


def _sampled(trajectory: Trajectory, begin: int, end: int) -> bool:
    """Every position has a version and a possible logprob. A sum is finite only if every term is."""
    logprobs: list[Any] = trajectory.logprobs[begin:end]
    versions: list[Any] = trajectory.versions[begin:end]
    try:
        sum(versions)
        return math.isfinite(sum(logprobs)) and max(logprobs) <= LOGPROB_SLACK
    except TypeError:  # None is no term
        return False


def _unsampled(trajectory: Trajectory, begin: int, end: int) -> bool:
    nothing = [None] * (end - begin)
    return trajectory.logprobs[begin:end] == nothing and trajectory.versions[begin:end] == nothing


def _check_digests(trajectory: Trajectory, ids: memoryview) -> None:
    """What stands before each turn is what was sent for it, and what stands in it is what came back."""
    digest = position = 0
    for number, turn in enumerate(trajectory.turns, 1):
        digest = zlib.crc32(ids[position : turn.start], digest)
        if turn.prompt_digest is not None and turn.prompt_digest != digest:
            raise TokenLawError(
                f"turn {number} was sampled behind other ids than the {turn.start} that stand before it",
                "append to a trajectory, and never change what it holds",
                LawRule.PROMPT,
            )
        digest = zlib.crc32(ids[turn.start : turn.end], digest)
        position = turn.end
        if turn.sampled_digest is not None and turn.sampled_digest != digest:
            raise TokenLawError(
                f"turn {number}, tokens {turn.start} to {turn.end}, holds other ids than the engine sampled",
                "append to a trajectory, and never change what it holds",
                LawRule.SAMPLED,
            )


def _check_step_rewards(trajectory: Trajectory) -> None:
    spans = {(turn.start, turn.end) for turn in trajectory.turns}
    for reward in trajectory.step_rewards:
        if (reward.start, reward.end) not in spans:
            raise TokenLawError(
                f"the step reward {reward.name!r} is on tokens {reward.start} to {reward.end}, which are no turn",
                rule=LawRule.STEP_REWARD,
            )
        if not math.isfinite(reward.value):
            raise TokenLawError(f"the step reward {reward.name!r} is {reward.value}", rule=LawRule.STEP_REWARD)
