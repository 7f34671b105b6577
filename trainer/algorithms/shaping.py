"""Changes of an episode's reward that do not come from its task: length and number of turns. Off unless asked for.

No torch. `docs/algorithms.md` tells what each does to a policy.
"""

from __future__ import annotations


def overlong_penalty(length: int, limit: int, buffer: int, factor: float) -> float:
    """What is added to the reward of an answer that comes close to its limit: 0, or down to `-factor`.

    0 up to `limit - buffer` tokens, then linear, `-factor` at `limit`. Source: DAPO (arXiv 2503.14476), equation 13,
    soft overlong punishment; there the factor is 1.

    Args:
        length: tokens after the first prompt, tool output included, as `max_response_tokens` counts them.
    """
    over = length - (limit - buffer)
    return -factor * min(1.0, max(0.0, over / buffer))


def wrong_answer(turns: int, reward: float, bonus: float, cap: float | None) -> float:
    """The reward of an episode that earned nothing: `min(cap, reward + bonus * (turns - 1))`.

    With `bonus` 0 it is flat, whatever the turns. A bonus makes tool calls cheap: without a cap below what a right
    answer is worth in expectation, a policy learns to call tools forever, because wrong answers get cheaper with each
    turn. Source: ReTool (arXiv 2504.11536) has the flat form; the bonus is of a public recipe that follows it.

    Args:
        turns: generations of the episode.
        reward: of a wrong answer without tool calls.
        cap: None: 0, the form that fails.
    """
    return min(0.0 if cap is None else cap, reward + bonus * (turns - 1))
