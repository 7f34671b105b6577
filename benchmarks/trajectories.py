"""What `train.py` gives to both trainers: finished trajectories of a step, as pure functions of scenario and size.

Only the standard library: this file is imported by our environment and by TRL's.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from workload import GROUP, lengths_of

PROMPT_TOKENS = 36
SAMPLED_ID_LIMIT = 376
"""Ids below it are plain tokens of the quickstart's tokenizer: no control token ends a text on one side only."""


@dataclass(frozen=True)
class Row:
    """One trajectory: a prompt, and what was sampled after it."""

    prompt: list[int]
    completion: list[int]
    reward: float


def trajectories(scenario: str, prompts: int, step: int) -> list[Row]:
    """The rows of one step, group by group; rewards differ inside each group, so that no advantage is zero.

    Args:
        scenario: `equal` or `longtail`, with the lengths of `workload.lengths_of`.
        prompts: groups of a step; fewer than 32 take each 32 / prompts-th of the sorted lengths, so that median and
            maximum stay.
    """
    lengths = lengths_of(scenario)
    count = prompts * GROUP
    if count < len(lengths):
        ordered = sorted(lengths, reverse=True)
        lengths = [ordered[i * len(ordered) // count] for i in range(count)]
        random.Random(1).shuffle(lengths)
    draw = random.Random(step)
    rows = []
    for index, length in enumerate(lengths):
        if index % GROUP == 0:
            prompt = draw.choices(range(SAMPLED_ID_LIMIT), k=PROMPT_TOKENS)
        completion = draw.choices(range(SAMPLED_ID_LIMIT), k=length)
        rows.append(Row(prompt, completion, float(index % 2)))
    return rows
