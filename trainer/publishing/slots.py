"""The two folders that versions are written to in turn (`agentloop.weights.shared`)."""

from __future__ import annotations

from pathlib import Path

from agentloop.weights.shared import Progress


def begin_version(folder: Path, version: int) -> Path:
    """Return the slot of a version, marked as not yet written: its readers wait from now on.

    Even and odd versions have a slot each. Versions follow each other without gaps, so the version
    that is served lies in the other slot, and one that was not served is written again where it
    was.
    """
    slot = folder / ("odd" if version % 2 else "even")
    slot.mkdir(parents=True, exist_ok=True)
    Progress(slot, create=True).begin(str(version))
    return slot
