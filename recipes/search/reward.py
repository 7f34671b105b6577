"""Reward of search: exact match of the last `<answer>`, after the usual normalization.

The normalization is that of SQuAD and of Search-R1: lower case, punctuation and articles removed,
white space folded. Time is linear in the text, whatever the model wrote.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal

from agentloop.types import Task, Trajectory

OPEN, CLOSE = "<answer>", "</answer>"

MOST_TAGS = 10
"""More opening or closing tags than this divide the score: a text may not try many answers."""

TAGS_DIVISOR = 4.0

Method = Literal["em", "subem", "f1"]

_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation))
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def extract_answer(text: str) -> str | None:
    """Return what is in the last pair of answer tags, or None.

    A pair is an opening tag and the next closing one, read from the beginning of the text:
    `<answer>a<answer>b</answer>` is one pair.
    """
    answer, position = None, 0
    while (begin := text.find(OPEN, position)) >= 0:
        end = text.find(CLOSE, begin)
        if end < 0:
            break
        answer, position = text[begin + len(OPEN) : end], end + len(CLOSE)
    return None if answer is None else answer.strip()


def normalize(text: str) -> str:
    """Return a text as it is compared.

    >>> normalize(" The  Eiffel-Tower, ")
    'eiffeltower'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def targets_of(ground_truth: Any) -> list[str]:
    """Return the accepted answers of a row: `{target: [..]}`, a list, or one text.

    Raises:
        ValueError: there is none; a row without an answer must not be scored 0.
    """
    found = ground_truth.get("target") if isinstance(ground_truth, dict) else ground_truth
    if found is not None and hasattr(found, "tolist"):  # a column of parquet
        found = found.tolist()
    listed = [found] if isinstance(found, str | int | float) else found
    if not isinstance(listed, Iterable):
        raise ValueError("the row has no ground truth: give reward_model.ground_truth.target a list of answers")
    targets = [str(target) for target in listed if target is not None and str(target).strip()]
    if not targets:
        raise ValueError("the row has no ground truth: give reward_model.ground_truth.target a list of answers")
    return targets


def exact_match(answer: str, targets: Iterable[str]) -> float:
    """Return 1 if the answer equals a target."""
    found = normalize(answer)
    return float(any(_same(answer, found, target) for target in targets))


def sub_exact_match(answer: str, targets: Iterable[str]) -> float:
    """Return 1 if a target is a part of the answer."""
    found = normalize(answer)
    return float(
        any(((part := normalize(target)) and part in found) or _same(answer, found, target) for target in targets)
    )


def f1(answer: str, targets: Iterable[str]) -> float:
    """Return the best harmonic mean of precision and recall over words (SQuAD, section 6.1)."""
    best = 0.0
    found = normalize(answer)
    given = Counter(found.split())
    for target in targets:
        wanted = Counter(normalize(target).split())
        common = (given & wanted).total()
        score = 2 * common / (given.total() + wanted.total()) if common else 0.0
        best = max(best, score, float(_same(answer, found, target)))
    return best


METHODS = {"em": exact_match, "subem": sub_exact_match, "f1": f1}


def compute_score(text: str, ground_truth: Any, *, method: Method = "em", format_score: float = 0.0) -> float:
    """Return the score of a text, from 0 to 1.

    Args:
        format_score: of an answer that is wrong altogether.

    Raises:
        ValueError: the ground truth is missing.
    """
    targets = targets_of(ground_truth)
    answer = extract_answer(text)
    if answer is None:
        return 0.0
    score = METHODS[method](answer, targets)
    if not score:
        return format_score
    return score / TAGS_DIVISOR if max(text.count(OPEN), text.count(CLOSE)) > MOST_TAGS else score


def score(task: Task, text: str, trajectory: Trajectory) -> dict[str, float | str]:
    """Score the last assistant turn by exact match; `answer` is what was read, for maj@n."""
    return _scored(task, text, "em")


def score_subem(task: Task, text: str, trajectory: Trajectory) -> dict[str, float | str]:
    """The same by sub-EM. Long answers that list many names are not penalized: for evaluation."""
    return _scored(task, text, "subem")


def score_f1(task: Task, text: str, trajectory: Trajectory) -> dict[str, float | str]:
    """The same by F1 over words."""
    return _scored(task, text, "f1")


def _scored(task: Task, text: str, method: Method) -> dict[str, float | str]:
    return {"score": compute_score(text, task.ground_truth, method=method), "answer": extract_answer(text) or ""}


def _same(answer: str, found: str, target: str) -> bool:
    """Whether two texts are equal. A name of articles alone (The The) is compared as it is.

    Args:
        found: the normalized answer: once, since answers may be long and targets many.
    """
    right = normalize(target)
    return found == right if right else answer.strip().lower() == target.strip().lower()
