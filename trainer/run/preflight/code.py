"""Checks of rows against the code that they name: agents, tools, reward, interactions."""

from __future__ import annotations

from dataclasses import dataclass, field

from agentloop.agent.base import AgentLoop
from agentloop.agent.code import RunCode
from agentloop.config import Recipe
from agentloop.data import ImageMarks
from agentloop.types import Task
from agentloop.worker.tasks import encode_task
from trainer.run.notices import RowCounts, step_reward_sources


@dataclass
class RowChecks:
    """Checks the rows of one split against the code that they name.

    Args:
        key: the config key of the split.
        sent: whether episodes run in other processes, to which rows are sent.

    Attributes:
        answered: the interactions that rows name.
    """

    code: RunCode
    key: str
    answered: set[str] = field(default_factory=set)
    sent: bool = False

    def __post_init__(self) -> None:
        self._counts = RowCounts(self.key)
        self._agents: dict[str, type[AgentLoop]] = {}
        self._interactions: set[str] = set()
        self._marks = ImageMarks()

    def check(self, task: Task, where: str) -> None:
        """Check one row; `where` names it.

        Raises:
            UserError: it names an agent, a tool or an interaction that the recipe does not have, or
                their arguments are wrong; or it has `<image>` without an image, and others have
                images; or it holds what cannot be sent.
        """
        self._agents[task.agent_name] = self.code.agents.get(task.agent_name, where)
        name = self.code.interactions.check(task, where)
        if name is not None:
            self.answered.add(name)
            self._interactions.add(name)
        self.code.toolset.check(task, where)
        self._counts.count(task, where)
        self._marks.check(task, where)
        if self.sent:
            encode_task(task, where)

    def require_truth(self, recipe: Recipe) -> None:
        """Refuse a split without any ground truth for a reward that reads it.

        Raises:
            DataError: no row has one.
        """
        if self.code.needs_truth and recipe.reward is not None:
            self._counts.require_truth(recipe.reward.function)

    def warnings(self) -> list[str]:
        """Return a sentence for each probable mistake in the rows that were checked."""
        found = self._counts.warnings(needs_truth=self.code.needs_truth, tools=bool(self.code.toolset.tools))
        if self.code.reward is None and self._agents:
            interactions = {name: self.code.interactions.named[name] for name in sorted(self._interactions)}
            if not step_reward_sources(self._agents.values(), self.code.toolset.tools, interactions):
                found.append(
                    f"{self.key}: nothing seems to give a reward, so each will be 0: the recipe has no `reward`, and "
                    "neither the agents and tools nor an interaction that a row names in "
                    "extra_info.interaction_kwargs has code for a step reward"
                )
        return found
