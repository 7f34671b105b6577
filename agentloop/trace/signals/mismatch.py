"""Rules about the difference between the engine's and the trainer's logprobs.

Only tokens that the trained version sampled are compared (`facts.Drift`): with `max_staleness`
above 0, older ones differ because the policy has changed since.
"""

from __future__ import annotations

from functools import reduce

import numpy as np

from agentloop.trace.signals.evidence import Evidence, first_and_last
from agentloop.trace.signals.facts import POSITIONS, Drift, Sums
from agentloop.trace.signals.table import RULES, Signal, signal

LEAST = 2e-3
"""Mean |logprob difference| below which a growth is only noise of the arithmetic."""

FLOOR = 1e-4
"""Smallest difference that another is compared with."""

LEAST_TOKENS = 200
"""Tokens without which a mean is not compared."""

TIMES, LEAST_SEEN, MOST_NAMED = 10.0, 20, 5
"""A token stands out if its mean is this many times that of all, and it was sampled this often; at
most so many are named."""


def mismatch_growth(evidence: Evidence) -> Signal | None:
    """Mismatch that grows over the steps."""
    means = [mean for facts in evidence.steps if (mean := facts.drift.by_token.mean) is not None]
    ends, fresh = first_and_last(means), ", among tokens of the trained version"
    if not means:
        rows = [row for row in evidence.train if not row.get("staleness/max")]
        ends, fresh = first_and_last(Evidence(rows).values("mismatch/logprob_abs_mean")), ""
    if ends is None or ends[1] < LEAST:
        return None
    value = ends[1] / max(FLOOR, ends[0])
    if value < RULES["mismatch_growth"].bound:
        return None
    return signal("mismatch_growth", value, evidence.step, _worst(evidence), early=ends[0], late=ends[1], fresh=fresh)


def mismatch_by_turn(evidence: Evidence) -> Signal | None:
    """Mismatch that grows with the number of the turn."""
    found = _growth("mismatch_by_turn", _drift(evidence).by_turn)
    if found is None:
        return None
    value, turn, first, last = found
    keys = _worst(evidence)
    return signal("mismatch_by_turn", value, evidence.step, keys, turn=turn + 1, early=first, late=last)


def mismatch_by_position(evidence: Evidence) -> Signal | None:
    """Mismatch that grows along the response."""
    found = _growth("mismatch_by_position", _drift(evidence).by_position)
    if found is None:
        return None
    value, part, first, last = found
    position = POSITIONS[part]
    return signal(
        "mismatch_by_position", value, evidence.step, _worst(evidence), position=position, early=first, late=last
    )


def mismatch_by_token(evidence: Evidence) -> Signal | None:
    """A few tokens of the vocabulary that carry a large part of the mismatch."""
    sums = _drift(evidence).by_token
    mean = sums.mean
    if mean is None or mean < FLOOR or sums.count.sum() < LEAST_TOKENS:
        return None
    seen = np.maximum(1, sums.count)
    apart = np.flatnonzero((sums.count >= LEAST_SEEN) & (sums.total / seen >= TIMES * mean))
    worst = apart[np.argsort(-sums.total[apart], kind="stable")][:MOST_NAMED]
    value = float(sums.total[worst].sum() / sums.total.sum())
    late = float(sums.total[worst].sum() / max(1.0, sums.count[worst].sum()))
    if value < RULES["mismatch_by_token"].bound or late < LEAST:
        return None
    ids = ", ".join(str(token) for token in worst)
    return signal(
        "mismatch_by_token",
        value,
        evidence.step,
        _worst(evidence),
        tokens=f"token {ids}" if len(worst) == 1 else f"tokens {ids}",
        share=float(sums.count[worst].sum() / sums.count.sum()),
        early=mean,
        late=late,
    )


def _drift(evidence: Evidence) -> Drift:
    return reduce(lambda total, facts: total + facts.drift, evidence.late, Drift())


def _growth(rule: str, sums: Sums) -> tuple[float, int, float, float] | None:
    """Return (ratio, index, mean at index 0, mean at the index) of the index with the largest mean,
    if the rule fires."""
    if not len(sums.count) or sums.count[0] < LEAST_TOKENS:
        return None
    means = np.where(sums.count >= LEAST_TOKENS, sums.total / np.maximum(1, sums.count), 0.0)
    index = int(means[1:].argmax()) + 1 if len(means) > 1 else 0
    first, last = float(means[0]), float(means[index])
    ratio = last / max(FLOOR, first)
    return (ratio, index, first, last) if last >= LEAST and ratio >= RULES[rule].bound else None


def _worst(evidence: Evidence) -> list[str]:
    """Return the keys of the episodes with the largest mismatch."""
    episodes = [episode for facts in evidence.late for episode in facts.episodes if episode.mismatch is not None]
    return [episode.key for episode in sorted(episodes, key=lambda episode: -(episode.mismatch or 0.0))]
