"""Rules about groups: without variance, or trained late."""

from __future__ import annotations

import statistics

from agentloop.trace.signals.evidence import WIDTH, Evidence, scored
from agentloop.trace.signals.facts import EpisodeFacts
from agentloop.trace.signals.table import RULES, Severity, Signal, signal

LEAST_GROUPS = 8

SOLVED = "They are solved: their rewards are the highest of the run. Harder tasks would teach more"
UNKNOWN = "Their tasks are solved, too hard or too easy, or the reward is wrong"
UNSOLVED = "Their tasks are too hard or too easy, or the reward is wrong: read some of them"


def equal_groups(evidence: Evidence) -> Signal | None:
    """Groups whose rewards are all equal, in the latest steps. A notice if most are solved, or if
    no trace says what they are."""
    groups = [group for facts in evidence.late for group in facts.groups if len(group) > 1]
    equal = [group for group in groups if len({episode.reward for episode in group}) == 1]
    shares = evidence.values("reward/zero_std_share")[-WIDTH:]
    if len(shares) == WIDTH:  # of all groups, where the facts may hold some
        value = statistics.median(shares)
    elif len(groups) >= LEAST_GROUPS:
        value = len(equal) / len(groups)
    else:
        return None
    if value < RULES["equal_groups"].bound:
        return None

    best = max((episode.reward or 0.0 for episode in scored(evidence.steps)), default=0.0)
    worst = min((episode.reward or 0.0 for episode in scored(evidence.steps)), default=0.0)
    unsolved = [group for group in equal if best == worst or (group[0].reward or 0.0) < best]
    severity: Severity = "warning" if equal and len(unsolved) >= len(equal) / 2 else "notice"
    cause = UNKNOWN if not equal else UNSOLVED if severity == "warning" else SOLVED
    keys = [group[0].key for group in reversed(unsolved if severity == "warning" else equal)]
    return signal("equal_groups", value, evidence.step, keys, severity, cause=cause)


def stale_groups(evidence: Evidence) -> Signal | None:
    """Groups whose oldest token is many versions behind."""
    oldest: dict[tuple[int, str], EpisodeFacts] = {}
    for facts in evidence.late:
        for episode in facts.episodes:
            if episode.staleness is not None:
                place = (facts.step, episode.group)
                if place not in oldest or episode.staleness > (oldest[place].staleness or 0):
                    oldest[place] = episode
    if len(oldest) < LEAST_GROUPS:
        return None
    found = sorted(oldest.values(), key=lambda episode: -(episode.staleness or 0))
    value = statistics.fmean(episode.staleness or 0 for episode in found)
    if value < RULES["stale_groups"].bound:
        return None
    return signal("stale_groups", value, evidence.step, [episode.key for episode in found])
