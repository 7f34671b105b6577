"""`gsm8k`: a simulated user who checks the answer and lets the model try again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentloop import Interaction, Message, Response, Task

from .reward import compute_score, extract_answer

MISSING = "There is no final answer. Solve the problem and write the answer as `#### <answer>`."
WRONG = "That answer is wrong. Look for the mistake, then give the final answer again as `#### <answer>`."


@dataclass(slots=True)
class _Attempts:
    """The user's state over one episode."""

    ground_truth: str
    count: int = 0


class Gsm8kInteraction(Interaction):
    """End the episode when the answer is correct, or after `max_tries` turns.

    A correct answer has a step reward of 1, a wrong one 0. The ground truth is the row's
    `interaction_kwargs.ground_truth`, else its `reward_model.ground_truth`.

    Keys of `config`:
        max_tries: turns of the model at most (2).
        format_score: step reward of a wrong answer in the right form (0.0).
        wrong, missing: the user's replies to a wrong answer and to a turn without an answer.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__(config)
        unknown = set(self.config) - {"max_tries", "format_score", "wrong", "missing"}
        if unknown:
            raise ValueError(f"unknown config: {', '.join(sorted(unknown))}")

        self._max_tries = int(self.config.get("max_tries", 2))
        self._format_score = float(self.config.get("format_score", 0.0))
        if self._max_tries < 1:
            raise ValueError(f"max_tries is {self._max_tries}, and must be at least 1")

    async def start(self, task: Task, **kwargs: Any) -> _Attempts:
        ground_truth = kwargs.get("ground_truth")
        ground_truth = task.ground_truth if ground_truth is None else ground_truth
        if ground_truth is None:
            raise ValueError(f"row {task.task_id} has no ground truth")
        return _Attempts(str(ground_truth))

    async def respond(self, state: _Attempts, messages: Sequence[Message]) -> Response:
        state.count += 1
        text = messages[-1]["content"]
        assert isinstance(text, str)

        reward = compute_score(text, state.ground_truth, format_score=self._format_score)
        if reward == 1.0 or state.count >= self._max_tries:
            return Response(reward=reward, done=True)

        missing = extract_answer(text) is None
        reply = self.config.get("missing", MISSING) if missing else self.config.get("wrong", WRONG)
        return Response([{"role": "user", "content": str(reply)}], reward)
