"""The metrics of a step's episodes, and the causes of failed ones."""

from __future__ import annotations

import itertools
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from agentloop.episode.calls import UNAVAILABLE
from agentloop.types import EpisodeStatus, Trajectory
from trainer.rollouts.producer import Group

MOST_CAUSES = 24
"""Distinct causes of failure that a message lists."""

LONGEST_CAUSE = 600
"""Characters of a cause in a message; the trace has all of it."""

DIGITS = re.compile(r"\d+")


def episode_metrics(groups: Sequence[Group], version: int) -> dict[str, Any]:
    """Return the metrics of a step's episodes.

    Args:
        version: the policy version that the step trains; staleness is counted from it.
    """
    trajectories = [t for group in groups for t in group.trajectories]
    episodes = [episode for group in groups for episode in group.episodes if episode]
    last = [episode[-1] for episode in episodes]
    rewards = [t.reward for t in last if t.status is EpisodeStatus.OK and t.reward is not None]
    equal, compared = equal_groups(groups)
    sampled = sum(t.sampled_tokens for t in trajectories)
    lengths = [t.response_length for t in trajectories]
    oldest = [v for t in trajectories if t.status is EpisodeStatus.OK and (v := t.min_version) is not None]

    def per_episode(key: str) -> float:
        return _mean(sum(t.metrics.get(key, 0.0) for t in episode) for episode in episodes)

    metrics: dict[str, Any] = {
        "reward/mean": statistics.fmean(rewards) if rewards else None,
        "reward/std": statistics.pstdev(rewards) if rewards else None,
        "reward/zero_std_groups": equal,
        "reward/zero_std_share": equal / compared if compared else None,
        "episode/count": len(last),
        "episode/turns_mean": _mean(sum(len(t.turns) for t in episode) for episode in episodes),
        "episode/user_turns_mean": per_episode("user_turns"),
        "episode/tool_calls_mean": per_episode("tool_calls"),
        "episode/tool_errors_mean": per_episode("tool_errors"),
        "episode/converted_arguments_mean": per_episode("converted_arguments"),
        "episode/malformed_calls_mean": per_episode("malformed_calls"),
        "episode/response_tokens_mean": _mean(lengths),
        "episode/response_tokens_max": max(lengths, default=0),
        "episode/forks": len(trajectories) - len(last),
        "episode/failed": sum(t.status is EpisodeStatus.FAILED for t in last),
        "episode/rejected": sum(t.status is EpisodeStatus.REJECTED for t in last),
        "rollout/tokens": sampled,
        "staleness/max": max((version - v for v in oldest), default=0),
    }

    for reason, count in sorted(Counter(t.stop_reason.value for t in last).items()):
        metrics[f"stop/{reason}"] = count
    for rule, count in sorted(Counter(t.broken_rule for t in last if t.broken_rule is not None).items()):
        metrics[f"rejected/{rule}"] = count
    return metrics


def failure_causes(trajectories: Iterable[Trajectory], limit: int = MOST_CAUSES) -> list[str]:
    """Return the distinct reasons why episodes failed or were rejected, each with its count.

    Reasons that differ only in their digits are one: messages name rows and numbers.

    Args:
        limit: reasons that are listed, in the order in which they appear; the rest are counted in a
            last line.
    """
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for trajectory in trajectories:
        if trajectory.status is not EpisodeStatus.OK:
            error = trajectory.error or "no reason recorded"
            kind = f"{trajectory.status.value}: {DIGITS.sub('#', error)}"
            counts[kind] += 1
            text = error if len(error) <= LONGEST_CAUSE else error[:LONGEST_CAUSE] + " ..."
            first.setdefault(kind, f"{trajectory.status.value} (row {trajectory.task_id}): {text}")

    causes = [
        f"{counts[kind]}x {text}".replace("\n", "\n    ") for kind, text in itertools.islice(first.items(), limit)
    ]
    if len(first) > limit:
        rest = sum(counts[kind] for kind in itertools.islice(first, limit, None))
        causes.append(f"{rest}x other causes ({len(first) - limit} kinds)")
    return causes


def failures_text(opening: str, failed: Sequence[Trajectory]) -> str:
    """Return `opening` with the causes: in the same line if there is one, else a line each."""
    causes = failure_causes(failed)
    return f"{opening}: {causes[0]}" if len(causes) == 1 else "\n  - ".join([f"{opening}:", *causes])


class AwayTools:
    """Counts by tool the episodes that called it, and those that it failed because it was away.

    Episodes that call no tool go on without it: they alone would be trained on, however long it is
    away, and their share is what training would raise.
    """

    def __init__(self) -> None:
        self._called: Counter[str] = Counter()
        self._away: Counter[str] = Counter()

    def add(self, episode: Sequence[Trajectory]) -> None:
        """Count an episode; its last trajectory has its spans."""
        calls = [span.attributes for span in episode[-1].spans if span.name == "tool" and "tool" in span.attributes]
        self._called.update({str(call["tool"]) for call in calls})
        self._away.update({str(call["tool"]) for call in calls if call.get(UNAVAILABLE)})

    def beyond(self, fraction: float) -> str | None:
        """Return a sentence on the tools that were away for more than `fraction` of the episodes
        that called them; None: that is true of none."""
        found = [name for name, count in sorted(self._away.items()) if count > fraction * self._called[name]]
        if not found:
            return None
        counts = [f"{self._away[name]} of {self._called[name]} episodes that called {name}" for name in found]
        return f"{' and '.join(counts)} failed because it was away"


def equal_groups(groups: Sequence[Group]) -> tuple[int, int]:
    """Return how many groups have equal rewards, and how many have two scored episodes or more."""
    scored = [
        [t.reward for episode in group.episodes if episode and (t := episode[-1]).status is EpisodeStatus.OK]
        for group in groups
    ]
    compared = [rewards for rewards in scored if len(rewards) > 1]
    return sum(len(set(rewards)) == 1 for rewards in compared), len(compared)


def _mean(values: Iterable[float]) -> float:
    collected = list(values)
    return statistics.fmean(collected) if collected else 0.0
