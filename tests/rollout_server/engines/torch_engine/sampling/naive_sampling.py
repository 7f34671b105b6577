"""The distribution that a request is sampled from, token by token in float64: what the sampler is held against."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from agentloop.wire import SamplingParams


def edited(
    logits: Sequence[float], sampled: Sequence[int], sampling: SamplingParams, ends: frozenset[int] = frozenset()
) -> list[float]:
    """The logits after penalties and bias. `ends` are the model's own end tokens."""
    counts = Counter(sampled)
    result = []
    for token, logit in enumerate(logits):
        times = counts[token]
        value = float(logit) - sampling.frequency_penalty * times
        if times:
            value -= sampling.presence_penalty
        if len(sampled) < sampling.min_new_tokens and (token in ends or token in (sampling.stop_token_ids or [])):
            value = -math.inf
        if times:
            value = value * sampling.repetition_penalty if value < 0 else value / sampling.repetition_penalty
        result.append(value + (sampling.logit_bias or {}).get(token, 0.0))
    return result


def whole(logits: Sequence[float], temperature: float) -> list[float]:
    """Probabilities after temperature; temperature 0 counts as 1."""
    scaled = [logit / (temperature or 1.0) for logit in logits]
    top = max(scaled)
    weights = [math.exp(logit - top) for logit in scaled]
    total = sum(weights)
    return [weight / total for weight in weights]


def truncated(probabilities: Sequence[float], sampling: SamplingParams) -> list[float]:
    """The probabilities that top-p, top-k and min-p leave."""
    order = sorted(range(len(probabilities)), key=lambda token: (-probabilities[token], token))
    kept = [0.0] * len(order)
    before, least = 0.0, sampling.min_p * max(probabilities)
    for rank, token in enumerate(order):
        probability = probabilities[token]
        likely = rank == 0 or before < sampling.top_p
        if likely and (sampling.top_k < 1 or rank < sampling.top_k) and probability >= least:
            kept[token] = probability
        before += probability
    total = sum(kept)
    return [probability / total for probability in kept]
