"""Penalties: what a request changes in its logits before the temperature, `logit_bias` and
`min_new_tokens` included.

Meaning and order are SGLang's: subtract frequency and presence penalties, mask end tokens, scale by
the repetition penalty, add the bias. All three penalties count sampled tokens only, never the
prompt.

Sizes: B rows of the batch, S rows with penalties, V vocabulary, M masked pairs of a row and a
token.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch

from agentloop.wire import SamplingParams

_LEAST_REPETITION = 1e-6
"""Smaller repetition penalties would make logits overflow, which would look like broken weights."""


@dataclass(slots=True, frozen=True)
class Penalties:
    """The penalties of one row. The first `min_new_tokens` tokens are not sampled from `ends`."""

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_new_tokens: int = 0
    ends: frozenset[int] = frozenset()

    @property
    def counts(self) -> bool:
        """Whether they depend on the tokens sampled before."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @classmethod
    def of(cls, sampling: SamplingParams, ends: frozenset[int]) -> Penalties | None:
        """The penalties a request sets; None if it sets none. `ends`: tokens that end a turn."""
        penalties = cls(
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
            tuple((token, bias) for token, bias in (sampling.logit_bias or {}).items() if bias),
            sampling.min_new_tokens,
            ends if sampling.min_new_tokens else frozenset(),
        )
        return penalties if penalties.counts or penalties.logit_bias or penalties.ends else None


class PenaltyProcessor:
    """Applies the penalties of a batch whose rows stay the same, and counts the tokens it samples,
    on the device.

    Args:
        penalties: of each row of the batch; None for rows without.
        sampled: all tokens each row has sampled so far, across preemptions and policy versions.
        vocab: width of the logits.
    """

    def __init__(
        self,
        penalties: SequenceOf[Penalties | None],
        sampled: SequenceOf[SequenceOf[int]],
        vocab: int,
        device: torch.device,
    ) -> None:
        places = [place for place, row in enumerate(penalties) if row is not None]
        rows = [row for row in penalties if row is not None]
        past = [sampled[place] for place in places]
        self._rows = torch.tensor(places, device=device)

        self._counts_SV: torch.Tensor | None = None
        if any(row.counts for row in rows):
            self._counts_SV = torch.stack(
                [
                    torch.bincount(torch.tensor(ids, dtype=torch.long, device=device), minlength=vocab).float()
                    for ids in past
                ]
            )

            def column(values: list[float]) -> torch.Tensor:
                return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

            self._frequency_S1 = column([row.frequency_penalty for row in rows])
            self._presence_S1 = column([row.presence_penalty for row in rows])
            self._repetition_S1 = column([max(row.repetition_penalty, _LEAST_REPETITION) for row in rows])

        biases = [(i, token, bias) for i, row in enumerate(rows) for token, bias in row.logit_bias]
        self._biased = _pairs([(i, token) for i, token, _ in biases], device)
        self._bias = torch.tensor([bias for _, _, bias in biases], dtype=torch.float32, device=device)

        # A row in which every token is an end token must sample one of them, so it is not masked.
        masks = [
            (i, token, row.min_new_tokens - len(ids))
            for i, (row, ids) in enumerate(zip(rows, past, strict=True))
            if row.min_new_tokens > len(ids) and len(row.ends) < vocab
            for token in row.ends
            if 0 <= token < vocab
        ]
        self._masked = _pairs([(i, token) for i, token, _ in masks], device)
        self._left_M = torch.tensor([left for _, _, left in masks], device=device)
        self._longest = max((left for _, _, left in masks), default=0)

    def __call__(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """The logits, changed in the rows with penalties; other rows keep their bits."""
        logits_SV = logits_BV[self._rows]
        seen_SV = None
        if self._counts_SV is not None:
            seen_SV = self._counts_SV > 0
            logits_SV -= self._frequency_S1 * self._counts_SV
            logits_SV -= self._presence_S1 * seen_SV
        if self._longest > 0:
            logits_SV[self._masked] = torch.where(self._left_M > 0, -torch.inf, logits_SV[self._masked])
        if seen_SV is not None:
            scaled_SV = torch.where(logits_SV < 0, logits_SV * self._repetition_S1, logits_SV / self._repetition_S1)
            logits_SV = torch.where(seen_SV, scaled_SV, logits_SV)

        if len(self._bias):
            logits_SV[self._biased] += self._bias
        return logits_BV.index_copy(0, self._rows, logits_SV)

    def advance(self, tokens_B: torch.Tensor) -> None:
        """Count the token [B] that each row has sampled."""
        if self._counts_SV is not None:
            tokens_S1 = tokens_B[self._rows][:, None]
            self._counts_SV.scatter_add_(1, tokens_S1, torch.ones_like(tokens_S1, dtype=torch.float32))
        self._left_M -= 1
        self._longest -= 1


def _pairs(pairs: list[tuple[int, int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """An index of (row, token) pairs."""
    index = torch.tensor(pairs, dtype=torch.long, device=device).view(-1, 2)
    return index[:, 0], index[:, 1]
