"""A stage of supervised fine-tuning: its tokenized rows, and the batch of each step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from agentloop.config import SftStage
from agentloop.errors import DataError
from agentloop.text import counted
from trainer.sft.rows import read_rows
from trainer.sft.tokenizing import SftRow, SftTokenizer, shared_prefix
from trainer.types import TrainSample


@dataclass(slots=True)
class TokenizedRows:
    """The rows of a source as ids and masks.

    Attributes:
        prefix: ids that most rows begin with; computed once per micro-batch.
        dropped, truncated: numbers of rows that were too long.
        seconds: time it took to read and tokenize them.
    """

    rows: list[SftRow]
    prefix: np.ndarray
    dropped: int
    truncated: int
    seconds: float

    @property
    def described(self) -> str:
        """Description for the log."""
        tokens = sum(len(row.token_ids) for row in self.rows)
        trained = sum(int(np.count_nonzero(row.loss_mask)) for row in self.rows)
        words = f"{counted(len(self.rows), 'row')}, {tokens:,} tokens, {trained:,} trained"
        if self.dropped:
            words += f"; {counted(self.dropped, 'row')} over max_tokens left out"
        if self.truncated:
            words += f"; {self.truncated:,} cut to max_tokens"
        if len(self.prefix):
            words += f"; the first {len(self.prefix)} tokens are shared by most"
        return f"{words} ({self.seconds:.1f} s to tokenize)"

    @property
    def digest(self) -> str:
        """Checksum of ids and masks, with which a resumed run notices changed data."""
        whole = xxhash.xxh3_64()
        for row in self.rows:
            whole.update(row.token_ids.astype(np.int64).tobytes())  # as in the digests of older runs
            whole.update(row.loss_mask.tobytes())
            for image in row.images:
                whole.update(image.tobytes())
        return whole.hexdigest()

    def sample(self, index: int, key: int) -> TrainSample:
        """Return a row as a training sample.

        Args:
            key: its group in the batch, from 1 on; 0 is the group of rows that share `prefix`.
        """
        row, length = self.rows[index], len(self.prefix)
        # The shared prompt must end before the first trained token: prompts have no loss.
        shares = 0 < length <= row.shareable and np.array_equal(row.token_ids[:length], self.prefix)

        unused = np.zeros(len(row.token_ids), dtype=np.float32)
        return TrainSample(
            token_ids=row.token_ids,
            loss_mask=row.loss_mask,
            old_logprobs=unused,
            advantages=unused,
            prompt_length=length if shares else 1,
            group_key=0 if shares else key,
            images=row.images,
        )


@dataclass(slots=True)
class Stage:
    """A stage with its rows.

    Attributes:
        number: index of the stage; together with the seed it determines the order of the rows.
        first: the global step after which the stage begins.
    """

    config: SftStage
    number: int
    first: int
    data: TokenizedRows
    seed: int
    shuffle: bool = True

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return self.config.steps or -(-len(self.data.rows) * (self.config.epochs or 0) // self.config.batch_size)

    @property
    def end(self) -> int:
        """The last global step of the stage."""
        return self.first + self.steps

    def batch(self, step: int) -> list[TrainSample]:
        """Return the sequences of global step `step`: a pure function, so that resuming is exact.

        With `epochs` the last batch is the rest, so that every row is seen exactly `epochs` times.
        """
        size, count = self.config.batch_size, len(self.data.rows)
        begin = (step - 1 - self.first) * size
        end = begin + size if self.config.steps else min(begin + size, count * (self.config.epochs or 0))

        order: dict[int, np.ndarray] = {}
        samples: list[TrainSample] = []
        for position in range(begin, end):
            epoch, offset = divmod(position, count)
            if epoch not in order:
                order[epoch] = self._order(epoch, count)
            samples.append(self.data.sample(order[epoch][offset], key=len(samples) + 1))
        return samples

    def _order(self, epoch: int, count: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(count)
        return np.random.default_rng((self.seed, self.number, epoch)).permutation(count)


def tokenize_rows(
    source: str | Sequence[str],
    key: str,
    tokenizer: SftTokenizer,
    *,
    max_rows: int | None = None,
    on_row: Callable[[int], None] | None = None,
) -> TokenizedRows:
    """Read and tokenize the rows of a source.

    Args:
        key: the config key of the source, for messages.
        on_row: called with the number of rows so far; an exception that it raises ends the work.

    Raises:
        DataError: a row cannot be used, or all are too long.
    """
    begin = time.perf_counter()
    dropped, truncated = tokenizer.dropped, tokenizer.truncated
    rows: list[SftRow] = []

    for where, row in read_rows(source, key):
        tokenized = tokenizer.row(row, where)
        if tokenized is not None:
            rows.append(tokenized)
        if len(rows) == max_rows:
            break
        if on_row is not None:
            on_row(len(rows))

    dropped, truncated = tokenizer.dropped - dropped, tokenizer.truncated - truncated
    if not rows:
        raise DataError(f"{key}: all {dropped} rows of {source} are longer than max_tokens", "raise max_tokens")
    return TokenizedRows(rows, shared_prefix(rows), dropped, truncated, time.perf_counter() - begin)
