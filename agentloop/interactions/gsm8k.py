"""`gsm8k`: a teacher who says whether the answer is right, and lets the model try again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentloop.interaction.base import Interaction, Response
from agentloop.rewards.gsm8k import compute_score, extract_answer
from agentloop.types import Message, Task

MISSING = "There is no final answer. Solve the problem and write the answer as `#### <answer>`."
WRONG = "That answer is wrong. Look for the mistake, then give the final answer again as `#### <answer>`."


@dataclass(slots=True)
class _Lesson:
    truth: str
    tries: int = 0


class Gsm8kInteraction(Interaction):
    """Done when the answer is right, or after `max_tries` turns. The right answer is a step reward of 1, others of 0.

    `config`: `max_tries` (2), `format_score` (0.0: what a wrong answer in the right form is worth), `wrong` and
    `missing` (what is said). The row's `interaction_kwargs.ground_truth` is the answer; else `reward_model`'s.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__(config)
        unknown = set(self.config) - {"max_tries", "format_score", "wrong", "missing"}
        if unknown:
            raise ValueError(f"unknown config: {', '.join(sorted(unknown))}")
        self._max_tries = int(self.config.get("max_tries", 2))
        self._format_score = float(self.config.get("format_score", 0.0))
        if self._max_tries < 1:
            raise ValueError("max_tries is at least 1")

    async def start(self, task: Task, **kwargs: Any) -> _Lesson:
        truth = kwargs.get("ground_truth", task.ground_truth)
        if truth is None:
            raise ValueError(f"row {task.task_id} has no ground truth")
        return _Lesson(str(truth))

    async def respond(self, state: _Lesson, messages: Sequence[Message]) -> Response:
        state.tries += 1
        text = messages[-1]["content"]
        assert isinstance(text, str)
        reward = compute_score(text, state.truth, format_score=self._format_score)
        if reward == 1.0 or state.tries >= self._max_tries:
            return Response(reward=reward, done=True)
        said = self.config.get("missing", MISSING) if extract_answer(text) is None else self.config.get("wrong", WRONG)
        return Response([{"role": "user", "content": str(said)}], reward)
