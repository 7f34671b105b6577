"""Rules about length, tool calls, how turns end, and tools and episodes that fail."""

from __future__ import annotations

import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from agentloop.text import clean, finite
from agentloop.trace.signals.evidence import WIDTH, Evidence, first_and_last, lowest_and_last, scored, share
from agentloop.trace.signals.facts import EpisodeFacts, StepFacts
from agentloop.trace.signals.table import RULES, Signal, signal

LEAST_TOKENS = 32
"""Tokens that a response must have gained before it is said to run away."""

LEAST_CALLS = 1.0
"""Calls that an episode must have gained before they are said to run away."""

LEAST_TRIES = 20
"""Calls of a tool in the compared steps, without which its failures say nothing."""

ERROR_LOG = Path("logs", "errors.jsonl")

FALLS = 0.8
"""A share that has fallen below this part of its first value is on its way to health."""


def length_runaway(evidence: Evidence) -> Signal | None:
    """Responses that grow while the reward does not."""
    ends = lowest_and_last(evidence.values("episode/response_tokens_mean"))
    if ends is None or evidence.reward_rose() or ends[1] - ends[0] < LEAST_TOKENS:
        return None
    value = ends[1] / max(1.0, ends[0])
    if value < RULES["length_runaway"].bound:
        return None
    keys = _most(evidence.late, lambda episode: episode.tokens)
    return signal("length_runaway", value, evidence.step, keys, early=ends[0], late=ends[1])


def calls_runaway(evidence: Evidence) -> Signal | None:
    """Tool calls that multiply while the reward does not rise."""
    ends = lowest_and_last(evidence.values("episode/tool_calls_mean"))
    if ends is None or evidence.reward_rose() or ends[1] - ends[0] < LEAST_CALLS:
        return None
    value = ends[1] / max(0.1, ends[0])
    if value < RULES["calls_runaway"].bound:
        return None
    keys = _most(evidence.late, lambda episode: len(episode.calls))
    return signal("calls_runaway", value, evidence.step, keys, early=ends[0], late=ends[1])


def length_stops(evidence: Evidence) -> Signal | None:
    """Turns that end in `length`; without records, episodes that do. A share that falls is not
    reported."""

    def stopped(episode: EpisodeFacts) -> tuple[int, int]:
        return len(episode.turn_stops), episode.turn_stops.count("length")

    late = [episode for facts in evidence.late for episode in facts.episodes]
    after = share(late, stopped)
    before = share([episode for facts in evidence.early for episode in facts.episodes], stopped)
    keys, unit = [episode.key for episode in late if "length" in episode.turn_stops], "turns"
    if after is None:
        shares = _length_shares(evidence)
        after = statistics.median(shares[-WIDTH:]) if len(shares) >= WIDTH else None
        ends = first_and_last(shares)
        before, unit = ends[0] if ends is not None else None, "episodes"

    if after is None or after < RULES["length_stops"].bound:
        return None
    if before is not None and after < FALLS * before:
        return None
    return signal("length_stops", after, evidence.step, keys, early=after if before is None else before, unit=unit)


def _length_shares(evidence: Evidence) -> list[float]:
    """Return the share of episodes that ended in `length`, by step."""
    shares = []
    for row in evidence.train:
        count = finite(row.get("episode/count"))
        if count and any(key.startswith("stop/") for key in row):
            shares.append((finite(row.get("stop/length")) or 0.0) / count)
    return shares


def tool_failures(evidence: Evidence) -> Signal | None:
    """The tool whose share of failed calls rose most; without spans, all tools together."""
    early, late = (
        [episode for facts in steps for episode in facts.episodes] for steps in (evidence.early, evidence.late)
    )
    before, after = _failures(early), _failures(late)
    rises = {tool: after[tool] - before[tool] for tool in before.keys() & after.keys()}
    if not rises:
        return _failures_of_rows(evidence) if not late else None
    tool = max(sorted(rises), key=lambda name: rises[name])
    if rises[tool] < RULES["tool_failures"].bound:
        return None
    keys = [
        episode.key
        for episode in sorted(late, key=lambda episode: -episode.tools.get(tool, (0, 0))[1])
        if episode.tools.get(tool, (0, 0))[1]
    ]
    named = f" of {clean(tool, 60)}" if tool else ""
    return signal("tool_failures", rises[tool], evidence.step, keys, early=before[tool], late=after[tool], tool=named)


def failed_episodes(evidence: Evidence) -> Signal | None:
    """Episodes of the latest steps that failed or were rejected, counted by the metrics: a trace
    that is cut keeps all that failed. It compares nothing, so one step is enough."""
    found = [(episode.key, episode.ok) for facts in reversed(evidence.steps[-WIDTH:]) for episode in facts.episodes]
    keys = [key for key, ok in found if not ok]
    rows = [row for row in evidence.rows if "episode/failed" in row and finite(row.get("episode/count"))][-WIDTH:]
    count, failed = float(len(found)), float(len(keys))
    if rows:
        count = sum(finite(row.get("episode/count")) or 0.0 for row in rows)
        failed = sum(finite(row.get(f"episode/{what}")) or 0.0 for row in rows for what in ("failed", "rejected"))
    value = failed / count if count > 0 else 0.0
    if value < RULES["failed_episodes"].bound:
        return None
    folder = evidence.run_dir
    run = shlex.quote(str(folder)) if folder is not None else "RUN"
    # It holds exceptions of user code: a service that fails raises none.
    errors = folder / ERROR_LOG if folder is not None else None
    log = f", and {errors}" if errors is not None and errors.is_file() else ""
    return signal("failed_episodes", value, evidence.step, keys, failed=failed, count=count, run=run, log=log)


def _failures_of_rows(evidence: Evidence) -> Signal | None:
    shares = []
    for row in evidence.train:
        calls, failed = (finite(row.get(f"episode/tool_{what}_mean")) for what in ("calls", "errors"))
        if calls and failed is not None:
            shares.append(failed / calls)
    ends = first_and_last(shares)
    if ends is None or ends[1] - ends[0] < RULES["tool_failures"].bound:
        return None
    return signal("tool_failures", ends[1] - ends[0], evidence.step, early=ends[0], late=ends[1], tool="")


def _failures(episodes: Sequence[EpisodeFacts]) -> dict[str, float]:
    """Return the share of failed calls of each tool that was called often enough."""
    calls: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for episode in episodes:
        for tool, (made, wrong) in episode.tools.items():
            calls[tool] += made
            failed[tool] += wrong
    return {tool: failed[tool] / count for tool, count in calls.items() if count >= LEAST_TRIES}


def _most(steps: Sequence[StepFacts], size: Callable[[EpisodeFacts], int]) -> list[str]:
    """Return the keys of the scored episodes, the largest first."""
    return [episode.key for episode in sorted(scored(steps[::-1]), key=lambda episode: -size(episode))]
