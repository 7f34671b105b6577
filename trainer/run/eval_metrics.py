"""The metrics of an evaluation: mean@n, pass@k and maj@n, over all rows and for each data source.

A failed episode has no answer: it is counted as failed and left out of everything else. A row whose
episodes all failed is left out, and pass@k is taken over the rows with at least k scored episodes.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentloop.types import EpisodeStatus, Trajectory

BOXED = r"\boxed{"
MARK = "####"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The part of an episode that an evaluation keeps: 50,000 trajectories would not fit in memory.

    Attributes:
        row: index of its row; the samples of a row are grouped by it.
        reward: None if the episode failed.
        answer: its vote in maj@n.
    """

    row: int
    source: str
    reward: float | None
    answer: str
    tool_calls: float
    response_tokens: int
    tool_errors: float = 0.0

    @classmethod
    def of(cls, row: int, episode: Sequence[Trajectory]) -> Outcome:
        """Return the outcome of an episode; its last trajectory is the main one."""
        main = episode[-1]
        text = main.turns[-1].text if main.turns else ""
        return cls(
            row=row,
            source=main.data_source,
            reward=main.reward if main.status is EpisodeStatus.OK else None,
            answer=final_answer(text) if main.answer is None else main.answer,
            tool_calls=main.metrics.get("tool_calls", 0.0),
            response_tokens=main.response_length,
            tool_errors=main.metrics.get("tool_errors", 0.0),
        )


def eval_metrics(outcomes: Sequence[Outcome], n: int, pass_reward: float) -> dict[str, Any]:
    """Return `eval/...` over all episodes, and `eval/<source>/...` over those of each named data
    source.

    Args:
        n: episodes per row.
        pass_reward: an episode with at least this reward passes.
    """
    metrics = _numbers(outcomes, n, pass_reward, "eval/")
    by_source: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_source[outcome.source].append(outcome)
    for source, some in sorted(by_source.items()):
        if source:
            metrics |= _numbers(some, n, pass_reward, f"eval/{source}/")
    return metrics


def _numbers(outcomes: Sequence[Outcome], n: int, pass_reward: float, prefix: str) -> dict[str, Any]:
    rows: dict[int, list[tuple[str, float]]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.reward is not None:
            rows[outcome.row].append((outcome.answer, outcome.reward))

    samples = list(rows.values())
    rewards = [reward for row in samples for _, reward in row]
    numbers: dict[str, Any] = {
        "reward_mean": statistics.fmean(rewards) if rewards else None,
        "episodes": len(outcomes),
        "failed": len(outcomes) - len(rewards),
        "tool_calls_mean": _mean(outcome.tool_calls for outcome in outcomes),
        "tool_errors_mean": _mean(outcome.tool_errors for outcome in outcomes),
        "response_tokens_mean": _mean(outcome.response_tokens for outcome in outcomes),
    }

    if n > 1:
        numbers[f"mean@{n}"] = _mean(statistics.fmean(reward for _, reward in row) for row in samples)
    for k in ks(n):
        passes = [(len(row), sum(reward >= pass_reward for _, reward in row)) for row in samples if len(row) >= k]
        numbers[f"pass@{k}"] = _mean(pass_at_k(total, passed, k) for total, passed in passes)
    if n > 1:
        numbers[f"maj@{n}"] = _mean(majority_reward(row) for row in samples)
    return {prefix + key: value for key, value in numbers.items()}


def ks(n: int) -> list[int]:
    """Return the k of the reported pass@k: 1, 2, 4, ... below n, and n."""
    return [*(2**i for i in range((n - 1).bit_length())), n]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate of the chance that one of k samples passes, from n samples of
    which c passed.

    1 - C(n-c, k) / C(n, k): Chen et al. 2021, "Evaluating Large Language Models Trained on Code",
    equation 1, in the form of its figure 3. The plug-in estimate 1 - (1 - c/n)^k is biased low.
    """
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def majority_reward(votes: Sequence[tuple[str, float]]) -> float:
    """Return the reward of a row's most frequent answer.

    The reward of an answer is the mean over the samples that gave it. If several answers tie, it is
    the mean of theirs: the expectation of a fair draw.

    Args:
        votes: (answer, reward) of each sample.
    """
    rewards: Mapping[str, list[float]] = defaultdict(list)
    for answer, reward in votes:
        rewards[answer].append(reward)
    most = max(map(len, rewards.values()))
    return statistics.fmean(statistics.fmean(given) for given in rewards.values() if len(given) == most)


def final_answer(text: str) -> str:
    """Return the answer in a turn's text, for reward functions that return no answer.

    It is the last `\\boxed{...}`, else the rest of the line after the last `####`, else the last
    line that is not blank, with white space normalized.
    """
    begin = text.rfind(BOXED)
    if begin >= 0:
        boxed = _braced(text[begin + len(BOXED) :])
        if boxed is not None:
            return " ".join(boxed.split())

    _, mark, behind = text.rpartition(MARK)
    if mark:
        text = behind.strip().partition("\n")[0]
    lines = [line for line in text.splitlines() if line.strip()]
    return " ".join(lines[-1].split()) if lines else ""


def _braced(text: str) -> str | None:
    """Return `text` up to the brace that closes one opened before it; None without one."""
    depth = 1
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:position]
    return None


def _mean(values: Iterable[float]) -> float | None:
    collected = list(values)
    return statistics.fmean(collected) if collected else None
