"""Layout of a micro-batch: one long row of samples, without padding, shared prompts computed once.

Two samples of one group: prompt `a b c` (P = 3), completions `d e f` and `g h`, both trained:

    index      0  1  2 | 3  4 | 5
    tokens     a  b  c | d  e | g       T = 6; the last token of a completion is only predicted
    positions  0  1  2 | 3  4 | 3       both completions continue where the prompt ends
    segments   prompt    1st    2nd     each attends causally to itself; 1st and 2nd also to the
                                        whole prompt

    predict_from  2  3  4   2  5        N = 5; the packed position whose hidden state predicts the
                                        target
    targets       d  e  f   g  h        index 2, the last of the prompt, predicts both first tokens

Unpacked this would be 3 + 3 + 3 + 2 = 11 tokens of forward and backward. A token that is not
trained (tool output) is in `tokens` and has no target; tokens after a sample's last trained token
cannot affect the loss and are cut.

Adjacent segments of equal length form one *run*, which attention computes as one batch; completions
of a group are therefore sorted by length. Shapes: T packed tokens, N trained tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainer.algorithms.aggregation import token_weight
from trainer.packing.units import Unit
from trainer.types import Aggregation, Sample, TrainSample


@dataclass(slots=True)
class PackedLayout:
    """The attention pattern of a packed row.

    Attributes:
        runs: `(start, count, length)`: `count` adjacent segments of `length` tokens, each causal
            within itself.
        prefixes: `(start, length, prompt_start, prompt_length)`: those tokens also attend to that
            whole prompt.
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
    """One micro-batch. The module's worked example explains the arrays.

    Attributes:
        tokens, positions: int64 (T).
        predict_from, targets: int64 (N).
        columns: float32 (N) each; the samples' own columns at the targets, by name
            (`Sample.COLUMNS`).
        loss_weights: float32 (N); factor on each token's loss, from the aggregation and the
            sample's weight.
        sample_index, token_index: int64 (N); target n is
            `samples[sample_index[n]].token_ids[token_index[n]]`.
        sequences: number of samples in this micro-batch.
        images: makes the `trainer.learner.model.vision.PackedImages` of the micro-batch when it is
            computed: those of all micro-batches together may need gigabytes. None: a text model.
    """

    layout: PackedLayout
    tokens: np.ndarray
    positions: np.ndarray
    predict_from: np.ndarray
    targets: np.ndarray
    columns: dict[str, np.ndarray]
    loss_weights: np.ndarray
    sample_index: np.ndarray
    token_index: np.ndarray
    sequences: int
    images: Callable[[], Any] | None = None


def pack(samples: Sequence[Sample], units: Sequence[Unit], aggregation: Aggregation) -> PackedBatch:
    """Lay out one or more `units` as one row."""
    row = _Row()
    columns: dict[str, list[np.ndarray]] = {name: [] for name in samples[units[0].samples[0]].COLUMNS}
    predict_from: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    loss_weights: list[np.ndarray] = []
    sample_index: list[np.ndarray] = []
    token_index: list[np.ndarray] = []

    for unit in units:
        prompt_start, prompt = row.end, unit.prompt_length
        row.append(samples[unit.samples[0]].token_ids[:prompt], 0)

        completions_start = row.end
        for index, length in zip(unit.samples, unit.lengths, strict=True):
            sample, start = samples[index], row.end
            row.append(sample.token_ids[prompt:length], prompt)

            # Token i is predicted at i - 1: in the shared prompt, or shifted to where this
            # completion begins.
            trained = np.flatnonzero(sample.loss_mask)
            before = trained - 1
            predict_from.append(np.where(before < prompt, prompt_start + before, start + before - prompt))
            targets.append(sample.token_ids[trained])
            for name, parts in columns.items():
                parts.append(getattr(sample, name)[trained])
            weight = token_weight(sample.weight, len(trained), aggregation)
            loss_weights.append(np.full(len(trained), weight, dtype=np.float32))
            sample_index.append(np.full(len(trained), index, dtype=np.int64))
            token_index.append(trained)

        if prompt and row.end > completions_start:
            row.layout.prefixes.append((completions_start, row.end - completions_start, prompt_start, prompt))

    return PackedBatch(
        layout=row.layout,
        # Samples hold int32 ids; the embedding and the loss index with int64.
        tokens=np.concatenate(row.tokens, dtype=np.int64),
        positions=np.concatenate(row.positions),
        predict_from=np.concatenate(predict_from),
        targets=np.concatenate(targets, dtype=np.int64),
        columns={name: np.concatenate(parts) for name, parts in columns.items()},
        loss_weights=np.concatenate(loss_weights),
        sample_index=np.concatenate(sample_index),
        token_index=np.concatenate(token_index),
        sequences=sum(len(unit.samples) for unit in units),
    )


def empty_batch(kind: type[Sample] = TrainSample) -> PackedBatch:
    """Return a batch of one token that trains nothing.

    A rank that has run out of work computes it so that the collectives of all ranks match.

    Args:
        kind: class of the samples, for the names of the columns.
    """
    ints, floats = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.float32)
    return PackedBatch(
        layout=PackedLayout(runs=[(0, 1, 1)]),
        tokens=ints,
        positions=ints,
        predict_from=ints,
        targets=ints,
        columns=dict.fromkeys(kind.COLUMNS, floats),
        loss_weights=floats,
        sample_index=ints,
        token_index=ints,
        sequences=0,
    )


@dataclass(slots=True)
class _Row:
    """The row under construction: token ids and positions by segment, and the attention pattern."""

    layout: PackedLayout = field(default_factory=PackedLayout)
    tokens: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    end: int = 0

    def append(self, ids: np.ndarray, first_position: int) -> None:
        """Append a segment whose first token has position `first_position`."""
        if len(ids):
            self.layout.add_segment(self.end, len(ids))
            self.tokens.append(ids)
            self.positions.append(np.arange(first_position, first_position + len(ids)))
            self.end += len(ids)
