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

LOOP, MORE_LOOPS = 3, 0.1
"""Equal calls in a row that make a loop; by how much the share of episodes with one must have
grown."""

NO_ARGUMENTS = "({})"
"""Ends the text of a call without arguments: it cannot depend on the task."""

SHOWN = 60


def repeated_answer(evidence: Evidence) -> Signal | None:
    """One answer that is the most frequent one of many groups with different tasks.

    Without the answers that the reward read there are only last words, and agents may end all
    episodes with the same ones ("done"): then the share must also have doubled.
    """
    favourites = _favourites(evidence.late)
    answered = sum(map(len, favourites.values()))
    if answered < LEAST_TASKS:
        return None

    what, firsts = max(favourites.items(), key=lambda item: len(item[1]))
    tasks = {episode.task for episode in firsts}
    kinds = {episode.answer for episode in scored([*evidence.early, *evidence.late])}
    value = len(firsts) / answered
    if len(tasks) < LEAST_TASKS or value < _bound("repeated_answer", len(kinds)):
        return None
    if not any(episode.answered for episode in firsts):
        before = _favourites(evidence.early)
        share = len(before.get(what, ())) / max(1, sum(map(len, before.values())))
        if not before or value < 2 * share:
            return None
    keys = [episode.key for episode in scored(evidence.late[::-1]) if episode.answer == what]
    return signal("repeated_answer", value, evidence.step, _spread(keys), what=_shown(what), tasks=len(tasks))


def _favourites(steps: Iterable[StepFacts]) -> dict[str, list[EpisodeFacts]]:
    """Return the first episodes of groups by the group's most frequent answer."""
    found: dict[str, list[EpisodeFacts]] = defaultdict(list)
    for facts in steps:
        for group in facts.groups:
            answers = Counter(episode.answer for episode in group if episode.answer)
            if answers:
                found[answers.most_common(1)[0][0]].append(group[0])
    return found


def repeated_call(evidence: Evidence) -> Signal | None:
    """One tool call, arguments included, that makes up most calls over different tasks.

    Calls without arguments are not counted.
    """
    made = [
        (call, episode)
        for episode in scored(evidence.late[::-1])
        for call in episode.calls
        if not call.endswith("({})")
    ]
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
    """Episodes that make one call several times in a row, more of them than in the first steps.

    Calls without arguments (`next_page()`) may well be repeated.
    """
    before, _, _ = _loops(evidence.early)
    value, loops, count = _loops(evidence.late)
    if count < LEAST_CALLS or value < RULES["call_loop"].bound or value < before + MORE_LOOPS:
        return None
    what = Counter(loops.values()).most_common(1)[0][0]
    keys = sorted(loops, key=lambda key: loops[key] != what)
    return signal("call_loop", value, evidence.step, keys, what=_shown(what), times=LOOP)


def _loops(steps: Sequence[StepFacts]) -> tuple[float, dict[str, str], int]:
    """Return the share of episodes with a loop, their calls by key, and how many make calls."""
    episodes = [episode for episode in scored(steps) if episode.calls]
    loops = {episode.key: call for episode in episodes if (call := _repeated_in_a_row(episode.calls)) is not None}
    return len(loops) / max(1, len(episodes)), loops, len(episodes)


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


def _repeated_in_a_row(calls: Sequence[str]) -> str | None:
    """Return the first call with arguments that is made `LOOP` times in a row, or None."""
    runs = ((call, len(list(run))) for call, run in itertools.groupby(calls) if not call.endswith(NO_ARGUMENTS))
    return next((call for call, length in runs if length >= LOOP), None)


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
