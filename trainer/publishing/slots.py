"""The two folders that versions are written to in turn (`agentloop.weights.shared`)."""

from __future__ import annotations

from pathlib import Path

from agentloop.weights.shared import Progress


def begin_version(folder: Path, version: int) -> Path:
    """Return the slot of a version, marked as not yet written: its readers wait from now on.

    Even and odd versions have one slot each. Versions are consecutive, so the served version is in
    the other slot, and a version that was not served is written again to the same slot.
    """
    slot = folder / ("odd" if version % 2 else "even")
    slot.mkdir(parents=True, exist_ok=True)
    Progress(slot, create=True).begin(str(version))
    return slot
