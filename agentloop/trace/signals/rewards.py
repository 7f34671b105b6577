"""Rules about the reward: against the evaluation, and against its own parts."""

from __future__ import annotations

import re
import statistics

import numpy as np

from agentloop.trace.signals.evidence import RISE, WIDTH, Evidence, scored
from agentloop.trace.signals.facts import EpisodeFacts
from agentloop.trace.signals.table import RULES, Signal, signal

FORMAT = re.compile(
    r"format|style|struct|syntax|tag|think|length|len\b|brevity|verbos|parse|json|xml|box|marker|template|penalt",
    re.IGNORECASE,
)
"""Names of reward parts that look at the form of an answer."""

EXPLAINED = 0.9
"""Share of the reward's variance that a sum of its parts must explain before parts are compared."""

FLAT = 0.1
"""Share of the gain in reward below which the other parts count as flat."""

LEAST_EVALS = 3


def reward_without_eval(evidence: Evidence) -> Signal | None:
    """Training reward up while the evaluation is flat, over the later half of the evaluations.

    The gain of the training reward must exceed `RISE` standard deviations of a step's rewards, and
    three times the standard error of the two means that are compared.
    """
    evals, rewards = evidence.series("eval/reward_mean"), evidence.series("reward/mean")
    if len(evals) < LEAST_EVALS:
        return None
    (first, eval_before), (last, eval_after) = evals[-1 - max(2, len(evals) // 2)], evals[-1]
    before = [value for step, value in rewards if step > first][:WIDTH]
    after = [value for step, value in rewards if step <= last][-WIDTH:]
    steps = [step for step, _ in rewards if first < step <= last]
    if len(steps) < 2 * WIDTH:
        return None

    gain, eval_gain = statistics.fmean(after) - statistics.fmean(before), eval_after - eval_before
    spread = statistics.stdev(before) + statistics.stdev(after)
    if gain < RISE * evidence.scale or gain < 3 * spread / WIDTH**0.5:
        return None
    value = eval_gain / gain
    if value >= RULES["reward_without_eval"].bound:
        return None
    late = [facts for facts in evidence.late if facts.step <= last] or evidence.late
    best = sorted(scored(late), key=lambda episode: -(episode.reward or 0.0))
    keys = [episode.key for episode in best]
    return signal("reward_without_eval", value, last, keys, first=first, gain=gain, eval_gain=eval_gain)


def format_reward(evidence: Evidence) -> Signal | None:
    """Reward that rises through parts about form alone.

    The weights of the parts are those of the least-squares fit of the reward by its parts, over the
    episodes of the first and the latest steps; a part's contribution to the gain is its weight
    times the change of its mean. Parts that do not add up to the reward say nothing.
    """
    early, late = scored(evidence.early), scored(evidence.late)
    names = sorted({name for episode in (*early, *late) for name in episode.parts})
    forms = [name for name in names if FORMAT.search(name)]
    others = [name for name in names if name not in forms]
    if not early or not late or not forms or not others:
        return None

    gain = _mean_reward(late) - _mean_reward(early)
    weights = _weights([*early, *late], names)
    if weights is None or gain < RISE * evidence.scale:
        return None
    change = dict(
        zip(names, weights * (_table(late, names).mean(axis=0) - _table(early, names).mean(axis=0)), strict=True)
    )
    from_form, from_others = (sum(change[name] for name in some) / gain for some in (forms, others))
    if not (from_form >= RULES["format_reward"].bound and from_others < FLAT):
        return None
    best = sorted(late, key=lambda episode: (-sum(episode.parts.get(name, 0.0) for name in forms), episode.key))
    return signal(
        "format_reward",
        from_form,
        evidence.step,
        [episode.key for episode in best],
        first=evidence.early[0].step,
        format_parts=", ".join(forms),
        other_parts=", ".join(others),
        other_gain=from_others,
    )


def _mean_reward(episodes: list[EpisodeFacts]) -> float:
    return statistics.fmean(episode.reward or 0.0 for episode in episodes)


def _table(episodes: list[EpisodeFacts], names: list[str]) -> np.ndarray:
    """Return (episodes, parts); a part that an episode lacks is 0."""
    return np.array([[episode.parts.get(name, 0.0) for name in names] for episode in episodes])


def _weights(episodes: list[EpisodeFacts], names: list[str]) -> np.ndarray | None:
    """Fit the reward by its parts; return the weights, or None if they explain too little."""
    parts = np.column_stack([_table(episodes, names), np.ones(len(episodes))])
    rewards = np.array([episode.reward or 0.0 for episode in episodes])
    variance = float(rewards.var())
    if variance == 0:
        return None
    found = np.linalg.lstsq(parts, rewards, rcond=None)[0]
    left = float(((rewards - parts @ found) ** 2).mean())
    return np.asarray(found[:-1]) if 1 - left / variance >= EXPLAINED else None
