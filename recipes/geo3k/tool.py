"""`calc_geo3k_reward`: lets the model check its answer before it gives the final one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentloop import Task, Tool, ToolResult
from agentloop.errors import ToolError
from agentloop.registry import TOOLS
from agentloop.runtime.processes import ProcessWorkers

NO_GAIN_PENALTY = -0.05
"""Step reward of a check that does not improve on the best so far: repeats must not be free."""

WORKERS = 2


@dataclass
class _Progress:
    """The tool's state over one episode."""

    ground_truth: str
    best: float = 0.0


class CalcGeo3kReward(Tool):
    """Score the argument `answer` against the row's ground truth, in processes that can be killed.

    The ground truth is the row's `create_kwargs.ground_truth`, else its
    `reward_model.ground_truth`.

    Keys of `config`:
        workers: processes (2).
    """

    def __init__(self, config: dict[str, Any], schema: dict[str, Any]) -> None:
        super().__init__(config, schema)
        self._check = ProcessWorkers(
            f"{Path(__file__).with_name('reward.py')}:check",
            Path(),
            TOOLS,
            form="tool",
            workers=int(config.get("workers", WORKERS)),
            memory_mb=None,
            name=self.name,
        )

    async def open(self, task: Task, **create_kwargs: Any) -> _Progress:
        ground_truth = create_kwargs.get("ground_truth", task.ground_truth)
        if ground_truth is None:
            raise ToolError(
                f"row {task.task_id} has no ground truth for {self.name}",
                f"set extra_info.tools_kwargs.{self.name}.create_kwargs.ground_truth or reward_model.ground_truth",
            )
        return _Progress(str(ground_truth))

    async def execute(self, state: _Progress, arguments: dict[str, Any], **execute_kwargs: Any) -> ToolResult:
        answer = str(arguments["answer"])
        found = await self._check({"arguments": {"answer": answer, "ground_truth": state.ground_truth}})
        value = float(found["text"])

        reward = 0.0 if value > state.best else NO_GAIN_PENALTY
        state.best = max(state.best, value)
        return ToolResult(f"Current parsed answer: {answer}, reward: {value:g}", reward=reward)

    async def reward(self, state: _Progress, **calc_reward_kwargs: Any) -> float:
        return state.best

    def shut_down(self) -> None:
        self._check.close()
