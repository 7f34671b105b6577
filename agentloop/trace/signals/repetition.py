"""Rules about repetition: one answer, one tool call, fewer distinct answers."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from agentloop.text import clean
from agentloop.trace.signals.evidence import Evidence, scored
from agentloop.trace.signals.facts import EpisodeFacts, StepFacts
from agentloop.trace.signals.table import RULES, Signal, signal

LEAST_TASKS = 8
"""Different tasks without which nothing is said to be repeated over tasks."""

LEAST_CALLS = 32
LEAST_SAMPLES = 4

FEW_KINDS, FEW_BOUND = 10, 0.8
"""With at most so many different answers (yes or no, A to D, four moves) one of them may well be
frequent: then the bound is 0.8."""

LOOP = 3
"""Equal calls in a row that make a loop."""

SHOWN = 60


def repeated_answer(evidence: Evidence) -> Signal | None:
    """One answer that is the most frequent one of many groups with different tasks."""
    groups = [group for facts in evidence.late for group in facts.groups]
    favourites: dict[str, list[EpisodeFacts]] = defaultdict(list)
    for group in groups:
        answers = Counter(episode.answer for episode in group if episode.answer)
        if answers:
            favourites[answers.most_common(1)[0][0]].append(group[0])
    answered = sum(map(len, favourites.values()))
    if not favourites or answered < LEAST_TASKS:
        return None

    what, firsts = max(favourites.items(), key=lambda item: len(item[1]))
    tasks = {episode.task for episode in firsts}
    kinds = {episode.answer for episode in scored([*evidence.early, *evidence.late])}
    value = len(firsts) / answered
    if len(tasks) < LEAST_TASKS or value < _bound("repeated_answer", len(kinds)):
        return None
    keys = [episode.key for episode in scored(evidence.late) if episode.answer == what]
    return signal("repeated_answer", value, evidence.step, _spread(keys), what=_shown(what), tasks=len(tasks))


def repeated_call(evidence: Evidence) -> Signal | None:
    """One tool call, arguments included, that makes up most calls over different tasks.

    Calls without arguments are not counted: they cannot depend on the task.
    """
    made = [(call, episode) for episode in scored(evidence.late) for call in episode.calls if not call.endswith("({})")]
    counts = Counter(call for call, _ in made)
    if len(made) < LEAST_CALLS:
        return None

    what, count = counts.most_common(1)[0]
    callers = [episode for call, episode in made if call == what]
    tasks = {episode.task for episode in callers}
    value = count / len(made)
    if len(tasks) < LEAST_TASKS or value < max(_bound("repeated_call", len(counts)), RULES["repeated_call"].bound):
        return None
    keys = [episode.key for episode in callers]
    return signal("repeated_call", value, evidence.step, _spread(keys), what=_shown(what), tasks=len(tasks))


def call_loop(evidence: Evidence) -> Signal | None:
    """Episodes that make one call several times in a row."""
    episodes = [episode for episode in scored(evidence.late) if episode.calls]
    if len(episodes) < LEAST_CALLS:
        return None
    loops = {episode.key: call for episode in episodes if (call := _longest_run(episode.calls)) is not None}
    value = len(loops) / len(episodes)
    if value < RULES["call_loop"].bound:
        return None
    what = Counter(loops.values()).most_common(1)[0][0]
    keys = sorted(loops, key=lambda key: loops[key] != what)
    return signal("call_loop", value, evidence.step, keys, what=_shown(what), times=LOOP)


def fewer_answers(evidence: Evidence) -> Signal | None:
    """A falling share of distinct answers in groups that are not solved, without a gain in reward.

    Solved groups, whose rewards are all the highest of the run, agree because they are right.
    """
    best = max((episode.reward or 0.0 for episode in scored(evidence.steps)), default=0.0)
    early, late = (_distinct(steps, best) for steps in (evidence.early, evidence.late))
    if len(early) < LEAST_TASKS or len(late) < LEAST_TASKS or evidence.reward_rose():
        return None
    before, after = statistics.fmean(share for share, _ in early), statistics.fmean(share for share, _ in late)
    value = after / before
    if value > RULES["fewer_answers"].bound:
        return None
    keys = [group[0].key for _, group in sorted(late, key=lambda found: found[0])]
    return signal("fewer_answers", value, evidence.step, keys, early=before, late=after)


def _distinct(steps: Iterable[StepFacts], best: float) -> list[tuple[float, list[EpisodeFacts]]]:
    """Return the share of distinct answers of each unsolved group with enough samples."""
    found = []
    for facts in steps:
        for group in facts.groups:
            solved = all((episode.reward or 0.0) >= best for episode in group)
            if len(group) >= LEAST_SAMPLES and not solved:
                found.append((len({episode.answer for episode in group}) / len(group), group))
    return found


def _longest_run(calls: Sequence[str]) -> str | None:
    """Return the call that is made `LOOP` times in a row, or None."""
    return next((call for call, run in itertools.groupby(calls) if len(list(run)) >= LOOP), None)


def _bound(rule: str, kinds: int) -> float:
    return FEW_BOUND if kinds <= FEW_KINDS else RULES[rule].bound


def _spread(keys: list[str]) -> list[str]:
    """Return the keys in an order that begins with different groups."""
    by_group: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        by_group[key.rsplit("/", 2)[0]].append(key)
    return [key for row in itertools.zip_longest(*by_group.values()) for key in row if key is not None]


def _shown(text: str) -> str:
    return repr(clean(text, SHOWN))
