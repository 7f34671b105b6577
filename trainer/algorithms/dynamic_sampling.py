"""Dynamic sampling: a group that teaches nothing is replaced by one of another prompt. No torch.

Source: DAPO (arXiv 2503.14476), section 3.2 and equation 11. There prompts are drawn until the batch is full of groups
with variance; here each slot of a batch is drawn again at most so many times, in its own place, so that which rows a
step holds depends on nothing but the rewards.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

STRIDE = 1_000_003
"""A prime, so that with less than a million rows in file order no replacement is the row itself."""


def replacement(index: int, attempt: int) -> int:
    """The index whose row group `index` works on at `attempt` (0: its own): a pure function, also after a resume."""
    return index + attempt * STRIDE


def teaches_nothing(scores: Sequence[Hashable]) -> bool:
    """Whether at least two episodes were scored, and all of them alike.

    With fewer scored the group has failed, which is another matter and stays visible.
    """
    return len(scores) >= 2 and len(set(scores)) == 1
