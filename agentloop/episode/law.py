"""The token law at ingest: checks of each trajectory and each episode before it may be trained."""

from __future__ import annotations

import math
import zlib
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from agentloop.columns import NO_LOGPROB_BITS, Logprobs, LossMask, TokenIds, Versions
from agentloop.errors import LawRule, TokenLawError

if TYPE_CHECKING:
    from agentloop.types import Trajectory

LOGPROB_SLACK = 1e-4
"""A logprob is at most 0; engines compute in half precision and may round to slightly above it."""


def extend_digest(digest: int, ids: Sequence[int]) -> int:
    """Extend the digest of a sequence by new ids; the digest of an empty sequence is 0.

    CRC-32 of the ids as 64-bit integers: detects mistakes, not attacks.
    """
    return zlib.crc32(array("q", ids), digest)


def check_trajectory(trajectory: Trajectory) -> None:
    """Check rules 1, 2 and 5 of the token law.

    Raises:
        TokenLawError: names the rule and the first position that breaks it.
    """
    ids = _check_columns(trajectory)
    _check_sampled(trajectory, ids)
    _check_digests(trajectory, ids.data)
    _check_step_rewards(trajectory)


def check_episode(trajectories: Sequence[Trajectory], *, image_token: int | None = None) -> None:
    """Check each trajectory of an episode, and rule 4: no sampled turn is trained in two of them.

    Args:
        image_token: the placeholder of images; None: the model takes none.

    Raises:
        TokenLawError: names the rule.
    """
    trained: dict[str, int] = {}
    for number, trajectory in enumerate(trajectories, 1):
        check_trajectory(trajectory)
        if image_token is not None:
            check_images(trajectory, image_token)
        for turn in trajectory.turns:  # each has mask 1, as check_trajectory has verified
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


def check_images(trajectory: Trajectory, image_token: int) -> None:
    """Check that placeholders stand for the trajectory's images, and that none was sampled.

    Raises:
        TokenLawError: the position of a sampled placeholder, or both numbers.
    """
    places = np.asarray(TokenIds(trajectory.token_ids)) == image_token
    sampled = np.flatnonzero(places & (np.asarray(LossMask(trajectory.loss_mask)) == 1))
    if len(sampled):
        raise TokenLawError(
            f"the image token {image_token} was sampled at position {sampled[0]}; it would count as part of an image",
            "serve the model with agentloop serve, which never samples it",
            LawRule.IMAGES,
        )

    check_placeholders(trajectory.token_ids, image_token, len(trajectory.images))


def check_placeholders(token_ids: Sequence[int], image_token: int, images: int) -> None:
    """Check that ids have one run of placeholders for each image.

    Raises:
        TokenLawError: the numbers differ.
    """
    places = np.asarray(TokenIds(token_ids)) == image_token
    runs = int(np.count_nonzero(places[1:] & ~places[:-1])) + int(places[:1].sum())
    if runs != images:
        raise TokenLawError(
            f"{images} images have {runs} runs of the image token {image_token}",
            "keep each image in the message in which it was rendered",
            LawRule.IMAGES,
        )


def _check_columns(trajectory: Trajectory) -> np.ndarray:
    """Check the lengths; return the token ids as int64."""
    n = len(trajectory.token_ids)
    for name in ("loss_mask", "logprobs", "versions"):
        entries = len(getattr(trajectory, name))
        if entries != n:
            raise TokenLawError(f"{name} has {entries} entries for {n} token ids", rule=LawRule.COLUMNS)
    try:
        ids = np.asarray(TokenIds(trajectory.token_ids), dtype=np.int64)
    except TypeError as exc:
        raise TokenLawError(f"a token id is not an integer: {exc}", rule=LawRule.COLUMNS) from exc
    if not 0 < trajectory.prompt_length <= n:
        raise TokenLawError(f"prompt_length {trajectory.prompt_length} is outside 1..{n}", rule=LawRule.EMPTY)
    return ids


def _check_sampled(trajectory: Trajectory, ids: np.ndarray) -> None:
    if _is_lawful(trajectory, ids):
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
            fault = f"position {i} has loss mask 0 but a logprob or version"
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


def _is_lawful(trajectory: Trajectory, ids: np.ndarray) -> bool:
    """Check whole columns as `_check_sampled` does; False: check each token to name the fault."""
    sampled = np.zeros(len(ids), dtype=bool)
    end = 0
    for turn in trajectory.turns:
        if not end <= turn.start <= turn.end <= len(ids):
            return False
        sampled[turn.start : turn.end] = True
        end = turn.end

    try:
        mask = np.asarray(LossMask(trajectory.loss_mask))
        logprobs = Logprobs(trajectory.logprobs)
    except (TypeError, ValueError):
        return False
    versions = trajectory.versions if isinstance(trajectory.versions, Versions) else Versions(trajectory.versions)

    has_logprob = np.frombuffer(logprobs.bits(), dtype=np.uint64) != NO_LOGPROB_BITS
    has_version = np.zeros(len(ids), dtype=bool)
    for start, end, version in versions.runs():
        has_version[start:end] = version is not None
    of_sampled = np.asarray(logprobs)[sampled]
    return bool(
        ids.min() >= 0
        and not sampled[: trajectory.prompt_length].any()
        and np.array_equal(mask, sampled)
        and np.array_equal(has_logprob, sampled)
        and np.array_equal(has_version, sampled)
        and np.isfinite(of_sampled).all()
        and of_sampled.max(initial=-math.inf) <= LOGPROB_SLACK
    )


def _check_digests(trajectory: Trajectory, ids: memoryview) -> None:
    """Check that each turn follows the ids that were sent, and holds the ids that were returned."""
    digest = position = 0
    for number, turn in enumerate(trajectory.turns, 1):
        digest = zlib.crc32(ids[position : turn.start], digest)
        if turn.prompt_digest is not None and turn.prompt_digest != digest:
            raise TokenLawError(
                f"turn {number} was sampled after other ids than the {turn.start} that precede it",
                "append to a trajectory, and never change its tokens",
                LawRule.PROMPT,
            )

        digest = zlib.crc32(ids[turn.start : turn.end], digest)
        position = turn.end
        if turn.sampled_digest is not None and turn.sampled_digest != digest:
            raise TokenLawError(
                f"turn {number}, tokens {turn.start} to {turn.end}, holds other ids than the engine sampled",
                "append to a trajectory, and never change its tokens",
                LawRule.SAMPLED,
            )


def _check_step_rewards(trajectory: Trajectory) -> None:
    spans = {(turn.start, turn.end) for turn in trajectory.turns}
    for reward in trajectory.step_rewards:
        if (reward.start, reward.end) not in spans:
            raise TokenLawError(
                f"the step reward {reward.name!r} is on tokens {reward.start} to {reward.end}, which are not a turn",
                rule=LawRule.STEP_REWARD,
            )
        if not math.isfinite(reward.value):
            raise TokenLawError(f"the step reward {reward.name!r} is {reward.value}", rule=LawRule.STEP_REWARD)
