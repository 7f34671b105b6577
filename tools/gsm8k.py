"""`calc_gsm8k_reward`: lets the model check its answer while it can still change it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agentloop.errors import ToolError
from agentloop.rewards.gsm8k import compute_score
from agentloop.tool.base import Tool
from agentloop.types import Task, ToolResult

NO_GAIN_PENALTY = -0.05
"""Step reward of a check that is no better than the best one before: asking again must not be free."""


@dataclass
class _Checked:
    ground_truth: str
    best: float = 0.0
    calls: int = 0


class Gsm8kReward(Tool):
    """Scores the argument `answer` against the row's ground truth, remembered over the episode.

    The ground truth is `create_kwargs.ground_truth` of the row, else the row's own `reward_model.ground_truth`.
    """

    async def open(self, task: Task, **create_kwargs: Any) -> _Checked:
        ground_truth = create_kwargs.get("ground_truth", task.ground_truth)
        if ground_truth is None:
            raise ToolError(
                f"row {task.task_id} has no ground truth for {self.name}",
                f"set extra_info.tools_kwargs.{self.name}.create_kwargs.ground_truth or reward_model.ground_truth",
            )
        return _Checked(str(ground_truth))

    async def execute(self, state: _Checked, arguments: dict[str, Any], **execute_kwargs: Any) -> ToolResult:
        answer = str(arguments["answer"])
        text = answer if answer.startswith("#### ") else f"#### {answer}"
        value = compute_score(text, state.ground_truth)
        reward = 0.0 if value > state.best else NO_GAIN_PENALTY
        state.best = max(state.best, value)
        state.calls += 1
        return ToolResult(f"Current parsed answer: {answer}, reward: {value:g}", reward=reward)

    async def reward(self, state: _Checked, **calc_reward_kwargs: Any) -> float:
        return state.best
