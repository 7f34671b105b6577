"""Dynamic sampling: replace a group that teaches nothing by a group of another prompt.

Source: DAPO (arXiv 2503.14476), section 3.2 and equation 11. The paper draws prompts until the
batch is full of groups with variance. Here each place of a batch is drawn again, up to a maximum
number of times, so that the rows of a step depend on the rewards only, and not on timing.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

STRIDE = 1_000_003
"""A prime: with fewer than a million rows in file order, a replacement is never the row itself."""


def replacement(index: int, attempt: int) -> int:
    """Return the index whose row group `index` uses at `attempt` (0: its own).

    A pure function, so that a resumed run draws the same rows.
    """
    return index + attempt * STRIDE


def teaches_nothing(scores: Sequence[Hashable]) -> bool:
    """Whether at least two episodes were scored, all with the same score.

    With fewer scores the group has failed. It is not replaced, so that failures stay visible.
    """
    return len(scores) >= 2 and len(set(scores)) == 1
