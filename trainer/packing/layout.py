"""Packing: samples become micro-batches of one long row, with nothing padded and shared prompts computed once.

Two samples of one group, prompt `a b c` (P = 3), completions `d e f` and `g h`, everything after the prompt trained:

    index      0  1  2 | 3  4 | 5
    tokens     a  b  c | d  e | g            T = 6; the last token of a completion is only ever predicted
    positions  0  1  2 | 3  4 | 3            both completions go on where the prompt ends
    segments   prompt    1st    2nd          each attends causally to itself; 1st and 2nd also to all of the prompt

    predict_from  2  3  4   2  5             N = 5; the packed position whose hidden state predicts the target
    targets       d  e  f   g  h             index 2, the last of the prompt, predicts both first tokens

Unpacked this would be 3 + 3 + 3 + 2 = 11 tokens of forward and backward. A token that is not trained (tool output) is
in `tokens` and has no target; what follows the last trained token of a sample cannot matter and is cut.

Segments of equal length that lie side by side form one *run*, which attention computes as one batch: completions of
a group are therefore sorted by length. Shapes: T packed tokens, N trained tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainer.algorithms.aggregation import token_weight
from trainer.types import Aggregation, TrainSample


@dataclass(slots=True)
class PackedLayout:
    """Who attends to whom in a packed row.

    Attributes:
        runs: `(start, count, length)`: `count` adjacent segments of `length` tokens, each causal within itself.
        prefixes: `(start, length, prompt_start, prompt_length)`: those tokens also attend to that whole prompt.
    """

    runs: list[tuple[int, int, int]] = field(default_factory=list)
    prefixes: list[tuple[int, int, int, int]] = field(default_factory=list)

    def add_segment(self, start: int, length: int) -> None:
        """Append a segment; equal neighbours become one run."""
        if self.runs:
            run_start, count, run_length = self.runs[-1]
            if run_length == length and run_start + count * run_length == start:
                self.runs[-1] = (run_start, count + 1, length)
                return
        self.runs.append((start, 1, length))


@dataclass(slots=True)
class PackedBatch:
    """One micro-batch. The arrays are explained in the module's worked example.

    Attributes:
        tokens, positions: int64 (T).
        predict_from, targets: int64 (N).
        old_logprobs, advantages: float32 (N).
        loss_weights: float32 (N); the factor of each token's loss under the aggregation and the sample's weight.
        sample_index, token_index: int64 (N); target n is `samples[sample_index[n]].token_ids[token_index[n]]`.
        sequences: samples in this micro-batch.
        images: of a vision-language model: `trainer.learner.model.vision.PackedImages`.
    """

    layout: PackedLayout
    tokens: np.ndarray
    positions: np.ndarray
    predict_from: np.ndarray
    targets: np.ndarray
    old_logprobs: np.ndarray
    advantages: np.ndarray
    loss_weights: np.ndarray
    sample_index: np.ndarray
    token_index: np.ndarray
    sequences: int
    images: Any = None


@dataclass(slots=True)
class Unit:
    """Samples that are packed together: all or some of a group, with one copy of the prompt.

    Attributes:
        samples: indices into the call's samples, by length.
        lengths: how many tokens of each sample are computed (up to its last trained token, exclusive).
        prompt_length: length of the shared prompt; 0 when the unit is one sample, packed as it is.
    """

    samples: list[int]
    lengths: list[int]
    prompt_length: int

    @property
    def tokens(self) -> int:
        return self.prompt_length + sum(length - self.prompt_length for length in self.lengths)

    @property
    def attention_pairs(self) -> float:
        """(query, key) pairs that attention computes."""
        pairs = self.prompt_length**2 / 2
        for length in self.lengths:
            completion = length - self.prompt_length
            pairs += completion * self.prompt_length + completion**2 / 2
        return pairs


def plan_units(samples: Sequence[TrainSample], max_tokens: int) -> list[Unit]:
    """Group samples by their prompt, in the order of first appearance; cut groups of more than `max_tokens`.

    Samples without a trained token are left out: they have no gradient.
    """
    groups: dict[int, list[tuple[int, int]]] = {}
    for index, sample in enumerate(samples):
        trained = np.flatnonzero(sample.loss_mask)
        if len(trained):
            groups.setdefault(sample.group_key, []).append((int(trained[-1]), index))
    units = []
    for members in groups.values():
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
    """Fill micro-batches of at most `max_tokens` in order; a larger unit gets one of its own."""
    batches: list[list[Unit]] = []
    room = 0
    for unit in units:
        if not batches or unit.tokens > room:
            batches.append([])
            room = max_tokens
        batches[-1].append(unit)
        room -= unit.tokens
    return batches


def split_over_ranks(samples: Sequence[TrainSample], ranks: int, max_tokens: int, hidden_size: int) -> list[list[int]]:
    """Divide samples over ranks so that each has about the same work; groups stay whole where that is fair.

    The work of a unit is its tokens plus attention pairs / (6 * hidden size): the ratio of their floating-point
    operations in a decoder block whose MLP is three times as wide as its hidden state.

    Returns:
        for each rank, indices into `samples`, ascending: the order in which it computes them.
    """
    if ranks == 1:
        return [list(range(len(samples)))]
    total = sum(unit.tokens for unit in plan_units(samples, max_tokens))
    units = plan_units(samples, min(max_tokens, -(-total // ranks)))
    costs = [unit.tokens + unit.attention_pairs / (6 * hidden_size) for unit in units]
    loads = [0.0] * ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for cost, unit in sorted(zip(costs, units, strict=True), key=lambda pair: -pair[0]):
        rank = loads.index(min(loads))
        loads[rank] += cost
        shares[rank].extend(unit.samples)
    return [sorted(share) for share in shares]


def pack(samples: Sequence[TrainSample], units: Sequence[Unit], aggregation: Aggregation) -> PackedBatch:
    """Lay out `units` as one row."""
    layout = PackedLayout()
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    columns: dict[str, list[np.ndarray]] = {
        name: []
        for name in (
            "predict_from", "targets", "old_logprobs", "advantages", "loss_weights", "sample_index", "token_index"
        )
    }  # fmt: skip
    end = 0

    def append(ids: np.ndarray, first_position: int) -> None:
        nonlocal end
        if len(ids):
            layout.add_segment(end, len(ids))
            tokens.append(ids)
            positions.append(np.arange(first_position, first_position + len(ids)))
            end += len(ids)

    for unit in units:
        prompt_start, prompt = end, unit.prompt_length
        append(samples[unit.samples[0]].token_ids[:prompt], 0)
        completions_start = end
        for index, length in zip(unit.samples, unit.lengths, strict=True):
            sample, start = samples[index], end
            append(sample.token_ids[prompt:length], prompt)
            trained = np.flatnonzero(sample.loss_mask)
            # Token i is predicted at i - 1; in a shared prompt, or shifted by where this completion lies.
            before = trained - 1
            weight = token_weight(sample.weight, len(trained), aggregation)
            columns["predict_from"].append(np.where(before < prompt, prompt_start + before, start + before - prompt))
            columns["targets"].append(sample.token_ids[trained])
            columns["old_logprobs"].append(sample.old_logprobs[trained])
            columns["advantages"].append(sample.advantages[trained])
            columns["loss_weights"].append(np.full(len(trained), weight, dtype=np.float32))
            columns["sample_index"].append(np.full(len(trained), index, dtype=np.int64))
            columns["token_index"].append(trained)
        if prompt and end > completions_start:
            layout.prefixes.append((completions_start, end - completions_start, prompt_start, prompt))
    return PackedBatch(
        layout=layout,
        tokens=np.concatenate(tokens),
        positions=np.concatenate(positions),
        sequences=sum(len(unit.samples) for unit in units),
        **{name: np.concatenate(parts) for name, parts in columns.items()},
    )


def empty_batch() -> PackedBatch:
    """One token that trains nothing: a rank that ran out of work runs it so that the collectives of all ranks match."""
    ints, floats = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.float32)
    return PackedBatch(
        layout=PackedLayout(runs=[(0, 1, 1)]),
        tokens=ints,
        positions=ints,
        predict_from=ints,
        targets=ints,
        old_logprobs=floats,
        advantages=floats,
        loss_weights=floats,
        sample_index=ints,
        token_index=ints,
        sequences=0,
    )


def packed_length(samples: Sequence[TrainSample]) -> int:
    """Tokens that are computed for `samples`, shared prompts once: what a run counts its micro-batches in."""
    return sum(unit.tokens for unit in plan_units(samples, max_tokens=1 << 62))
