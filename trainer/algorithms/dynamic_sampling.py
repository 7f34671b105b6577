"""Dynamic sampling: replace a group without a learning signal by a group of another prompt.

Source: DAPO (arXiv 2503.14476), section 3.2 and equation 11. The paper draws prompts until the
batch is full of groups with variance. Here each place of a batch is drawn again, up to a maximum
number of times, so that the rows of a step depend on the rewards only, and not on timing.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

STRIDE = 1_000_003
"""A prime, so that with fewer than a million rows a replacement is never the row itself."""


def replacement(index: int, attempt: int) -> int:
    """Return the index of the row that group `index` uses at `attempt` (0: its own row).

    A pure function, so that a resumed run draws the same rows.
    """
    return index + attempt * STRIDE


def teaches_nothing(scores: Sequence[Hashable]) -> bool:
    """Whether at least two episodes were scored, all with the same score.

    A group with fewer scores has failed. It is not replaced, so that failures stay visible.
    """
    return len(scores) >= 2 and len(set(scores)) == 1
