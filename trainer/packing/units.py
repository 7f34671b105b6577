"""Units of packing: samples that share a prompt, divided over ranks and micro-batches.

`layout` has a worked example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.types import Sample

UNLIMITED = 1 << 62


@dataclass(slots=True)
class Unit:
    """Samples that are packed together: all or some of a group, with one copy of the prompt.

    Attributes:
        samples: indices into the call's samples, sorted by length.
        lengths: number of tokens computed of each sample, up to its last trained token (exclusive).
        prompt_length: length of the shared prompt; 0 for a unit of a single sample.
    """

    samples: list[int]
    lengths: list[int]
    prompt_length: int

    @property
    def tokens(self) -> int:
        return self.prompt_length + sum(length - self.prompt_length for length in self.lengths)

    @property
    def attention_pairs(self) -> float:
        """Number of (query, key) pairs that attention computes."""
        pairs = self.prompt_length**2 / 2
        for length in self.lengths:
            completion = length - self.prompt_length
            pairs += completion * self.prompt_length + completion**2 / 2
        return pairs


def plan_units(samples: Sequence[Sample], max_tokens: int) -> list[Unit]:
    """Group samples by prompt, in the order of first appearance; split those over `max_tokens`.

    Samples without a trained token are left out: they have no gradient.
    """
    groups: dict[int, list[tuple[int, int]]] = {}
    for index, sample in enumerate(samples):
        trained = np.flatnonzero(sample.loss_mask)
        if len(trained):
            groups.setdefault(sample.group_key, []).append((int(trained[-1]), index))

    units = []
    for members in groups.values():
        # By length: segments of equal length become neighbours, which attention computes as one
        # batch.
        members.sort()
        prompt_length = samples[members[0][1]].prompt_length
        part: list[tuple[int, int]] = []
        tokens = prompt_length
        for length, index in members:
            if part and tokens + length - prompt_length > max_tokens:
                units.append(_unit(part, prompt_length))
                part, tokens = [], prompt_length
            part.append((length, index))
            tokens += length - prompt_length
        units.append(_unit(part, prompt_length))
    return units


def _unit(members: list[tuple[int, int]], prompt_length: int) -> Unit:
    return Unit(
        samples=[index for _, index in members],
        lengths=[length for length, _ in members],
        prompt_length=prompt_length if len(members) > 1 else 0,
    )


def micro_batches(units: Sequence[Unit], max_tokens: int) -> list[list[Unit]]:
    """Fill micro-batches of at most `max_tokens` in order; a larger unit gets one to itself."""
    batches: list[list[Unit]] = []
    room = 0
    for unit in units:
        if not batches or unit.tokens > room:
            batches.append([])
            room = max_tokens
        batches[-1].append(unit)
        room -= unit.tokens
    return batches


def split_over_ranks(samples: Sequence[Sample], ranks: int, max_tokens: int, hidden_size: int) -> list[list[int]]:
    """Divide samples over ranks into shares of about equal work; keep groups whole if possible.

    The work of a unit is its tokens plus attention pairs / (6 * hidden size): the ratio of their
    floating-point operations in a decoder block with an MLP three times as wide as its hidden
    state.

    Returns:
        for each rank, indices into `samples`, ascending: the order in which it computes them.
    """
    if ranks == 1:
        return [list(range(len(samples)))]

    # A unit may not be larger than one rank's fair share, or some rank would have no work.
    total = packed_length(samples, max_tokens)
    units = plan_units(samples, min(max_tokens, -(-total // ranks)))
    costs = [unit.tokens + unit.attention_pairs / (6 * hidden_size) for unit in units]

    # Greedy: the largest unit goes to the rank with the least work so far.
    loads = [0.0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for cost, unit in sorted(zip(costs, units, strict=True), key=lambda pair: -pair[0]):
        rank = loads.index(min(loads))
        loads[rank] += cost
        shares[rank].extend(unit.samples)
    return [sorted(share) for share in shares]


def packed_length(samples: Sequence[Sample], max_tokens: int = UNLIMITED) -> int:
    """Return the number of tokens computed for `samples`, with shared prompts counted once."""
    return sum(unit.tokens for unit in plan_units(samples, max_tokens))
