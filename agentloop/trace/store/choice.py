"""Choose the groups of a step that its trace has room for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import xxhash

from agentloop.trace.record import TraceRecord
from agentloop.trace.store.encode import estimate
from agentloop.types import EpisodeStatus

TRIED_BYTES = 2 << 20
"""Bytes before compression of the groups that are compressed to learn the ratio."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The records to write, and what is left out.

    Attributes:
        metadata: what the file records about it.
    """

    records: Sequence[TraceRecord]
    left_out_groups: int = 0
    left_out_episodes: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)


def choose(
    records: Sequence[TraceRecord], max_bytes: int | None, seed: int, ratio: Callable[[Sequence[TraceRecord]], float]
) -> Choice:
    """Choose whole groups within a number of bytes.

    The order in which groups are chosen depends only on seed, step and group. Episodes that failed
    or were rejected are always kept, also those of groups that are left out.

    Args:
        max_bytes: of the file; None: all records.
        ratio: returns compressed bytes of records, divided by `estimate` of them.
    """
    if max_bytes is None or estimate(records) <= max_bytes:
        return Choice(records)

    groups: dict[str, list[TraceRecord]] = {}
    for record in records:
        groups.setdefault(record.trajectory.group_id, []).append(record)
    order = sorted(groups, key=lambda group_id: _rank(seed, records[0].step, group_id))
    unhealthy = [record for record in records if not _is_ok(record)]

    tried: list[TraceRecord] = []
    for group_id in order:
        tried += groups[group_id]
        if estimate(tried) >= TRIED_BYTES:
            break
    scale = ratio(tried)
    room = max_bytes / max(scale, 1e-9) - estimate(unhealthy)
    chosen: set[str] = set()
    for group_id in order:
        room -= estimate(record for record in groups[group_id] if _is_ok(record))
        if room < 0:
            break
        chosen.add(group_id)
    kept = [record for record in records if record.trajectory.group_id in chosen or not _is_ok(record)]
    episodes, left = _episodes(records), _episodes(records) - _episodes(kept)
    metadata = {
        "max_bytes": max_bytes,
        "seed": seed,
        "groups": len(groups),
        "episodes": episodes,
        "left_out_groups": len(groups) - len(chosen),
        "left_out_episodes": left,
    }
    return Choice(kept, len(groups) - len(chosen), left, metadata)


def _rank(seed: int, step: int, group_id: str) -> int:
    return xxhash.xxh3_64_intdigest(f"{seed}/{step}/{group_id}".encode("utf-8", "surrogatepass"))


def _is_ok(record: TraceRecord) -> bool:
    return record.trajectory.status is EpisodeStatus.OK


def _episodes(records: Sequence[TraceRecord]) -> int:
    return len({(record.trajectory.group_id, record.trajectory.sample_index) for record in records})
