"""The code that a recipe names (agents, tools, reward, interactions), and what rows need of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from agentloop.agent.base import AgentLoop
from agentloop.agent.loading import Agents
from agentloop.config import Recipe
from agentloop.data import ImageMarks
from agentloop.interaction.loading import Interactions, load_interactions
from agentloop.reward.loading import RewardFunction, load_reward, reads_ground_truth
from agentloop.tool.loading import load_toolset
from agentloop.tool.session import Toolset
from agentloop.types import Task
from trainer.run.notices import RowCounts, step_reward_sources


@dataclass(frozen=True)
class RunCode:
    """Agents, tools, reward and interactions of a recipe.

    Attributes:
        reward: None: the sum of the step rewards.
        needs_truth: whether the reward reads the ground truth of a row.
    """

    agents: Agents
    toolset: Toolset
    reward: RewardFunction | None
    interactions: Interactions
    needs_truth: bool

    @classmethod
    def load(cls, recipe: Recipe) -> RunCode:
        """Import what a recipe names.

        Raises:
            UserError: something cannot be loaded; the message names its key.
        """
        agents = Agents(recipe.agents, recipe.folder)
        agents.get(recipe.data.default_agent, "data.default_agent")
        return cls(
            agents=agents,
            toolset=load_toolset(recipe.tools) if recipe.tools else Toolset(),
            reward=load_reward(recipe.reward),
            interactions=load_interactions(recipe.interactions) if recipe.interactions else Interactions(),
            needs_truth=reads_ground_truth(recipe.reward),
        )


@dataclass
class RowChecks:
    """Checks the rows of one split against the code that they name.

    Args:
        key: the config key of the split.

    Attributes:
        answered: the interactions that rows name.
    """

    code: RunCode
    key: str
    answered: set[str] = field(default_factory=set)

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
                images.
        """
        self._agents[task.agent_name] = self.code.agents.get(task.agent_name, where)
        name = self.code.interactions.check(task, where)
        if name is not None:
            self.answered.add(name)
            self._interactions.add(name)
        self.code.toolset.check(task, where)
        self._counts.count(task, where)
        self._marks.check(task, where)

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
