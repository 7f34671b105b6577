"""Sampling: one uniform number a row, and the inverse of the cumulative distribution.

Sizes: B rows, V vocabulary, S rows that truncate.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from rollout_server.engines.torch_engine.sampling.penalties import Penalties, PenaltyProcessor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014), a bijection whose output bits look
    independent."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))


def stream_of(seed: int) -> int:
    """Start of a request's stream of uniforms, far from that of the next seed."""
    with np.errstate(over="ignore"):
        return int(mix(np.array([seed % 2**64], dtype=np.uint64) + _GOLDEN)[0])


def uniforms(streams: npt.NDArray[np.uint64], counters: npt.NDArray[np.uint64]) -> npt.NDArray[np.float32]:
    """Number `counters[i]` of stream `streams[i]`, in [0, 1 - 2^-23].

    It depends on these two alone, so a seeded request draws the same numbers whatever else runs,
    and wherever it was interrupted. 23 bits, so that the product with a float32 total stays below
    that total.
    """
    bits = mix(streams + counters * _GOLDEN) >> np.uint64(41)
    return bits.astype(np.float32) * np.float32(2.0**-23)


def invert(weights_BV: torch.Tensor, u_B1: torch.Tensor) -> torch.Tensor:
    """The index [B, 1] at which the cumulative weights exceed the fraction `u` of their total.

    An index of weight 0 is never returned. NaN weights give an index past the end.
    """
    cdf_BV = weights_BV.cumsum(-1)
    return torch.searchsorted(cdf_BV, u_B1 * cdf_BV[:, -1:], right=True)


@dataclass(slots=True, frozen=True)
class RowSampling:
    """Sampling parameters of one row; `stream` comes from `stream_of`."""

    temperature: float
    top_p: float
    top_k: int
    stream: int
    min_p: float = 0.0
    penalties: Penalties | None = None

    @property
    def truncates(self) -> bool:
        """Whether top-p, top-k or min-p apply."""
        return self.temperature > 0 and (self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0)


class Sampler:
    """Samples for a batch whose rows stay the same; a new batch needs a new sampler.

    The logprob of a token is taken after penalties and temperature and before truncation; greedy
    rows count as temperature 1. Without penalties a trainer can recompute it from logits and
    temperature alone.

    Args:
        rows: sampling parameters of each row.
        sampled: the tokens each row has sampled so far, read for rows with penalties only. None: no
            tokens.
        never_sampled: tokens that no row samples. They count in the logprobs of the others.
    """

    def __init__(
        self,
        rows: SequenceOf[RowSampling],
        device: torch.device,
        sampled: SequenceOf[SequenceOf[int]] | None = None,
        never_sampled: SequenceOf[int] = (),
    ) -> None:
        self._streams = np.array([row.stream for row in rows], dtype=np.uint64)
        self._device = device
        temperatures = [row.temperature or 1.0 for row in rows]
        self._scale = (
            None
            if all(t == 1.0 for t in temperatures)
            else torch.tensor([[1.0 / t] for t in temperatures], dtype=torch.float32, device=device)
        )

        greedy = [i for i, row in enumerate(rows) if row.temperature == 0]
        self._greedy = torch.tensor(greedy, device=device) if greedy else None
        truncated = [i for i, row in enumerate(rows) if row.truncates]
        self._truncated = torch.tensor(truncated, device=device) if truncated else None
        self._top_p = torch.tensor([[rows[i].top_p] for i in truncated], device=device)
        self._top_k = torch.tensor([[rows[i].top_k if rows[i].top_k > 0 else 2**31] for i in truncated], device=device)
        min_ps = [rows[i].min_p for i in truncated]
        self._min_p = torch.tensor(min_ps, device=device)[:, None] if any(min_ps) else None

        self._never = torch.tensor(never_sampled, device=device) if never_sampled else None

        penalties = [row.penalties for row in rows]
        self._penalties = penalties if any(penalties) else None
        self._sampled = sampled if sampled is not None else [()] * len(rows)
        self._processor: PenaltyProcessor | None = None  # made at the first draw

    def draw(self, logits_BV: torch.Tensor, counters: npt.NDArray[np.uint64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample token ids [B]; returns them and their logprobs [B].

        Row i draws uniform number `counters[i]` of its stream.
        """
        logits_BV = logits_BV.float()
        if self._penalties is not None:
            if self._processor is None:
                self._processor = PenaltyProcessor(self._penalties, self._sampled, logits_BV.shape[1], self._device)
            logits_BV = self._processor(logits_BV)
        if self._scale is not None:
            logits_BV = logits_BV * self._scale
        probs_BV = torch.softmax(logits_BV, -1)

        # After the softmax: logprobs stay those of the whole distribution, which the trainer
        # computes too.
        if self._never is not None:
            logits_BV = logits_BV.index_fill(1, self._never, -torch.inf)
            probs_BV = probs_BV.index_fill(1, self._never, 0.0)

        # Every row draws from the whole distribution; truncated and greedy rows are then replaced.
        u_B1 = torch.from_numpy(uniforms(self._streams, counters)).to(self._device)[:, None]
        tokens_B1 = invert(probs_BV, u_B1)
        if self._truncated is not None:
            tokens_B1[self._truncated] = self._draw_truncated(probs_BV[self._truncated], u_B1[self._truncated])
        if self._greedy is not None:
            tokens_B1[self._greedy] = logits_BV[self._greedy].argmax(-1, keepdim=True)

        # Only NaN logits lead past the end; the caller detects them by their NaN logprob.
        tokens_B1.clamp_(max=logits_BV.shape[1] - 1)
        chosen_B = probs_BV.gather(-1, tokens_B1)[:, 0]
        if chosen_B.device.type != "cpu":
            return tokens_B1[:, 0], chosen_B.log_()
        # torch computes the last few numbers of a tensor with another function, which may round
        # differently; numpy uses one function for all.
        with np.errstate(divide="ignore", invalid="ignore"):
            return tokens_B1[:, 0], torch.from_numpy(np.log(chosen_B.numpy()))

    def advance(self, tokens: torch.Tensor) -> None:
        """Count `tokens` [B] as sampled in the next draw."""
        if self._processor is not None:
            self._processor.advance(tokens)

    def _draw_truncated(self, probs_SV: torch.Tensor, u_S1: torch.Tensor) -> torch.Tensor:
        sorted_SV, order_SV = probs_SV.sort(dim=-1, descending=True, stable=True)
        before_SV = sorted_SV.cumsum(-1) - sorted_SV
        rank_V = torch.arange(sorted_SV.shape[1], device=sorted_SV.device)
        # The likeliest token always stays, whatever top_p is.
        kept_SV = sorted_SV * ((rank_V < self._top_k) & ((before_SV < self._top_p) | (rank_V == 0)))
        if self._min_p is not None:
            kept_SV *= sorted_SV >= self._min_p * sorted_SV[:, :1]
        return order_SV.gather(-1, invert(kept_SV, u_S1).clamp_(max=order_SV.shape[1] - 1))
