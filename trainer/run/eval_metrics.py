"""The numbers of an evaluation: mean@n, pass@k and maj@n, of all rows and of each data source.

An episode that failed is no answer: it is counted, and everything else is taken over the others. A row of which every
episode failed has no number, and pass@k is taken over the rows that have k episodes at the least.
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
    """What an evaluation keeps of an episode: 50,000 trajectories would not fit into memory.

    Attributes:
        row: which row it is of, for the samples of one row to be found together.
        reward: None: the episode failed.
        answer: what it voted for in maj@n.
    """

    row: int
    source: str
    reward: float | None
    answer: str
    tool_calls: float
    response_tokens: int

    @classmethod
    def of(cls, row: int, episode: Sequence[Trajectory]) -> Outcome:
        """The outcome of an episode; its last trajectory is the main one."""
        main = episode[-1]
        text = main.turns[-1].text if main.turns else ""
        return cls(
            row=row,
            source=main.data_source,
            reward=main.reward if main.status is EpisodeStatus.OK else None,
            answer=final_answer(text) if main.answer is None else main.answer,
            tool_calls=main.metrics.get("tool_calls", 0.0),
            response_tokens=main.response_length,
        )


def eval_metrics(outcomes: Sequence[Outcome], n: int, pass_reward: float) -> dict[str, Any]:
    """`eval/...` of all episodes, and `eval/<source>/...` of those of each data source that rows name.

    Args:
        n: episodes of a row.
        pass_reward: an episode with this reward or more passes.
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
    """1, 2, 4, ... below n, and n: the k that n samples give a pass@k for."""
    return [*(2**i for i in range((n - 1).bit_length())), n]


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k samples passes, estimated without bias from n of which c passed.

    1 - C(n-c, k) / C(n, k): Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1, in the
    form of its figure 3. The plug-in 1 - (1 - c/n)^k is too low.
    """
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def majority_reward(votes: Sequence[tuple[str, float]]) -> float:
    """The reward of the answer that most samples of a row gave.

    Args:
        votes: (answer, reward) of each sample.

    Where several answers have most votes it is their mean: what a fair draw among them would give. The reward of an
    answer is the mean over the samples that gave it.
    """
    rewards: Mapping[str, list[float]] = defaultdict(list)
    for answer, reward in votes:
        rewards[answer].append(reward)
    most = max(map(len, rewards.values()))
    return statistics.fmean(statistics.fmean(given) for given in rewards.values() if len(given) == most)


def final_answer(text: str) -> str:
    """The answer in a turn's text, for rewards that name none: the last `\\boxed{...}`, else what the last `####` is
    followed by, else the last line that is not blank; white space evened out."""
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
    """`text` up to the brace that closes one opened before it; None: none does."""
    depth = 1
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:position]
    return None


def _mean(values: Iterable[float]) -> float | None:
    collected = list(values)
    return statistics.fmean(collected) if collected else None
