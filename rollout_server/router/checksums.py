"""The checksums that replicas confirm after an update, and the reference to compare them with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rollout_server.engines.base import BroadcastWeights, FolderWeights, WeightsConfirmation, WeightsSource
from rollout_server.errors import WeightsError


def agreed(expected: str | None, checksums: Sequence[str]) -> dict[str, str]:
    """Return the reference checksum by algorithm: the trainer's, or else the most frequent one.

    Engines with a different checksum function are compared only with each other.

    Example: `agreed("xxh3:aa", ["xxh3:aa", "xxh3:bb", "sglang:11"])` is `{"xxh3": "xxh3:aa",
        "sglang": "sglang:11"}`.
    """
    counts: dict[str, Counter[str]] = {}
    for checksum in checksums:
        counts.setdefault(_algorithm(checksum), Counter())[checksum] += 1

    result = {algorithm: count.most_common(1)[0][0] for algorithm, count in counts.items()}
    if expected is not None and _algorithm(expected) in result:
        result[_algorithm(expected)] = expected
    return result


def check(confirmation: WeightsConfirmation, checksums: Mapping[str, str]) -> None:
    """Compare a replica's confirmation with the reference checksum.

    Raises:
        WeightsError: the replica serves different weights.
    """
    counts = checksums.get(_algorithm(confirmation.checksum), confirmation.checksum)
    if counts != confirmation.checksum:
        raise WeightsError(
            f"checksum mismatch: it serves {confirmation.checksum} as version {confirmation.version}, which is {counts}"
        )


def lasting(source: WeightsSource) -> WeightsSource:
    """Return where the same weights can be loaded later: a broadcast is over, its copy stays."""
    if isinstance(source, BroadcastWeights) and source.copy is not None:
        return FolderWeights(source.copy, source.checksum)
    return source


def _algorithm(checksum: str) -> str:
    return checksum.partition(":")[0]
