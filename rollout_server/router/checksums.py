"""What replicas confirm about a new version, and whether they mean the same one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rollout_server.engines.base import (
    BroadcastWeights,
    FolderWeights,
    WeightsConfirmation,
    WeightsError,
    WeightsSource,
)


def agreed(expected: str | None, checksums: Sequence[str]) -> dict[str, str]:
    """The checksum that counts, by algorithm: the trainer's own where it is of that algorithm, else that of most.

    Engines with a checksum function of their own can be compared among themselves only.
    """
    counts: dict[str, Counter[str]] = {}
    for checksum in checksums:
        counts.setdefault(_algorithm(checksum), Counter())[checksum] += 1
    result = {algorithm: count.most_common(1)[0][0] for algorithm, count in counts.items()}
    if expected is not None and _algorithm(expected) in result:
        result[_algorithm(expected)] = expected
    return result


def check(receipt: WeightsConfirmation, checksums: Mapping[str, str]) -> None:
    """Compare a receipt with what counts.

    Raises:
        WeightsError: the replica serves something else.
    """
    counts = checksums.get(_algorithm(receipt.checksum), receipt.checksum)
    if counts != receipt.checksum:
        raise WeightsError(f"it serves {receipt.checksum} as version {receipt.version}, which is {counts}")


def lasting(source: WeightsSource) -> WeightsSource:
    """Where the same weights will be found later: a broadcast is over, its copy stays."""
    if isinstance(source, BroadcastWeights) and source.copy is not None:
        return FolderWeights(source.copy, source.checksum)
    return source


def _algorithm(checksum: str) -> str:
    return checksum.partition(":")[0]
