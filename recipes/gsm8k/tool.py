"""`calc_gsm8k_reward`: lets the model check its answer before it gives the final one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agentloop import Task, Tool, ToolResult
from agentloop.errors import ToolError

from .reward import compute_score, extract_answer

NO_GAIN_PENALTY = -0.05
"""Step reward of a check that does not improve on the best so far: repeats must not be free."""


@dataclass
class _Progress:
    """The tool's state over one episode."""

    ground_truth: str
    best: float = 0.0


class CalcGsm8kReward(Tool):
    """Score the argument `answer` against the row's ground truth.

    The ground truth is the row's `create_kwargs.ground_truth`, else its
    `reward_model.ground_truth`.
    """

    async def open(self, task: Task, **create_kwargs: Any) -> _Progress:
        ground_truth = create_kwargs.get("ground_truth")
        ground_truth = task.ground_truth if ground_truth is None else ground_truth
        if ground_truth is None:
            raise ToolError(
                f"row {task.task_id} has no ground truth for {self.name}",
                f"set extra_info.tools_kwargs.{self.name}.create_kwargs.ground_truth or reward_model.ground_truth",
            )
        return _Progress(str(ground_truth))

    async def execute(self, state: _Progress, arguments: dict[str, Any], **execute_kwargs: Any) -> ToolResult:
        answer = str(arguments["answer"]).strip()
        text = answer if answer.startswith("#### ") else f"#### {answer}"
        value = compute_score(text, state.ground_truth)

        reward = 0.0 if value > state.best else NO_GAIN_PENALTY
        state.best = max(state.best, value)
        parsed = extract_answer(text) or "none, give a plain number"
        return ToolResult(f"Current parsed answer: {parsed}, reward: {value:g}", reward=reward)

    async def reward(self, state: _Progress, **calc_reward_kwargs: Any) -> float:
        return state.best
