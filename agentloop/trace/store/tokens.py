"""The token columns of a trajectory as a trace file holds them.

A lawful trajectory is its ids, the spans that an engine sampled with their policy versions, and one
logprob for each sampled token. One that breaks the token law may fit no such form: it is then
`irregular`, and its four columns are kept as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agentloop.columns import NO_LOGPROB_BITS, Logprobs, LossMask, TokenIds, Versions
from agentloop.errors import TokenLawError

NO_VERSION = np.iinfo(np.int64).min
"""Stands for None among versions."""


@dataclass(slots=True)
class StoredTokens:
    """Token columns in stored form. `n` tokens, of which `k` are sampled, in `m` spans.

    Attributes:
        ids: (n) int32.
        starts, ends: (m) int32, bounds of the sampled spans.
        versions: (m) int64; `NO_VERSION`: none.
        logprobs: (k) float64.
        missing: (k) bool, True where there is no logprob; None: nowhere.
        single: whether float32 holds all logprobs exactly.
        mask: (n) bool, True for sampled tokens.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    versions: np.ndarray
    logprobs: np.ndarray
    missing: np.ndarray | None
    single: bool
    mask: np.ndarray


def store_tokens(
    token_ids: Sequence[int],
    loss_mask: Sequence[int],
    logprobs: Sequence[float | None],
    versions: Sequence[int | None],
) -> StoredTokens | None:
    """Return the stored form of four columns; None: they are irregular."""
    try:
        ids = np.asarray(token_ids if isinstance(token_ids, TokenIds) else TokenIds(token_ids))
        mask = np.asarray(loss_mask if isinstance(loss_mask, LossMask) else LossMask(loss_mask))
        numbers = np.asarray(logprobs if isinstance(logprobs, Logprobs) else Logprobs(logprobs))
        version = _version_array(versions if isinstance(versions, Versions) else Versions(versions))
    except (TokenLawError, TypeError, ValueError, OverflowError):
        return None
    if not len(ids) == len(mask) == len(numbers) == len(version) or mask.max(initial=0) > 1:
        return None

    sampled = mask == 1
    none = numbers.view(np.uint64) == NO_LOGPROB_BITS
    if not none[~sampled].all() or not (version[~sampled] == NO_VERSION).all():
        return None

    edges = np.flatnonzero((mask[1:] != mask[:-1]) | (version[1:] != version[:-1])) + 1
    starts = np.concatenate(([0], edges)) if len(ids) else edges
    ends = np.concatenate((edges, [len(ids)])) if len(ids) else edges
    chosen = sampled[starts]
    starts, ends = starts[chosen].astype(np.int32), ends[chosen].astype(np.int32)

    kept, missing = numbers[sampled], none[sampled]
    with np.errstate(over="ignore", invalid="ignore"):
        back = kept.astype(np.float32).astype(np.float64)
    single = bool(((back.view(np.uint64) == kept.view(np.uint64)) | missing).all())
    return StoredTokens(ids, starts, ends, version[starts], kept, missing if missing.any() else None, single, sampled)


def restore_tokens(
    ids: np.ndarray, starts: Sequence[int], ends: Sequence[int], versions: Sequence[int | None], logprobs: np.ndarray,
    missing: np.ndarray | None,
) -> tuple[TokenIds, LossMask, Logprobs, Versions]:  # fmt: skip
    """Return the four columns of a stored form; arguments as in `StoredTokens`."""
    n = len(ids)
    mask = np.zeros(n, dtype=np.uint8)
    column = Versions()
    last = 0
    for start, end, version in zip(starts, ends, versions, strict=True):
        if not last <= start <= end <= n:
            raise ValueError(f"sampled tokens {start} to {end} of {n} do not follow those to {last}")
        mask[start:end] = 1
        column.extend_run(None, start - last)
        column.extend_run(version, end - start)
        last = end
    column.extend_run(None, n - last)

    patterns = logprobs.astype(np.float64, copy=True).view(np.uint64)
    if missing is not None:
        patterns[missing] = NO_LOGPROB_BITS
    bits = np.full(n, NO_LOGPROB_BITS, dtype=np.uint64)
    bits[mask == 1] = patterns
    return TokenIds.from_array(ids), LossMask.from_array(mask), Logprobs.from_bits(bits), column


def irregular_columns(trajectory: Any) -> dict[str, list[Any]]:
    """Return the four columns of an irregular trajectory as lists, by name."""
    return {name: list(getattr(trajectory, name)) for name in ("token_ids", "loss_mask", "logprobs", "versions")}


def _version_array(versions: Versions) -> np.ndarray:
    runs = list(versions.runs())
    values = np.array([NO_VERSION if version is None else version for _, _, version in runs], dtype=np.int64)
    return np.repeat(values, [end - start for start, end, _ in runs])
