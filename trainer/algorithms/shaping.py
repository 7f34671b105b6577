"""Changes of an episode's reward for its length and number of turns. Off by default.

docs/algorithms.md describes the effect of each on a policy.
"""

from __future__ import annotations


def overlong_penalty(length: int, limit: int, buffer: int, factor: float) -> float:
    """Return the penalty, 0 to `-factor`, of an answer that comes close to its length limit.

    0 up to `limit - buffer` tokens, then linear, `-factor` at `limit`. Source: DAPO (arXiv
    2503.14476), equation 13, soft overlong punishment, with factor 1.

    Args:
        length: tokens after the first prompt, including tool output, as `max_response_tokens`
            counts them.
    """
    over = length - (limit - buffer)
    return -factor * min(1.0, max(0.0, over / buffer))


def wrong_answer(turns: int, reward: float, bonus: float, cap: float | None) -> float:
    """Return the reward of a wrong answer: `min(cap, reward + bonus * (turns - 1))`.

    With `bonus` 0 it does not depend on the turns. A bonus makes tool calls cheap: without a cap
    below the expected reward of a right answer, a policy learns to call tools forever, because a
    wrong answer costs less with each turn. Source: ReTool (arXiv 2504.11536) for the flat form; the
    bonus comes from a public recipe that builds on it.

    Args:
        turns: generations of the episode.
        reward: of a wrong answer without tool calls.
        cap: None means 0, with which the failure above can occur.
    """
    return min(0.0 if cap is None else cap, reward + bonus * (turns - 1))
