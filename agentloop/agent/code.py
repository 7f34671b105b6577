"""What episodes of a recipe need, loaded from it: renderer, agents, tools, reward, interactions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agentloop.agent.base import AgentLoop
from agentloop.agent.loading import Agents
from agentloop.agent.runner import EpisodeRunner, OnFault
from agentloop.chat import ChatRenderer, load_tokenizer
from agentloop.chat.images import load_image_tokens
from agentloop.chat.template import read_template
from agentloop.client.client import GenerateClient, Generator
from agentloop.config import ModelConfig, Recipe, RolloutConfig
from agentloop.interaction.loading import Interactions, load_interactions
from agentloop.reward.loading import RewardFunction, close_reward, load_reward, reads_ground_truth
from agentloop.tool.loading import load_toolset
from agentloop.tool.session import Toolset
from agentloop.trace import trace_headers


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

    def runner(
        self,
        recipe: Recipe,
        renderer: ChatRenderer,
        generator: Generator,
        *,
        agents: Mapping[str, type[AgentLoop]],
        context_length: int,
        on_fault: OnFault = lambda _fault, _row, _episode: None,
    ) -> EpisodeRunner:
        """Return a runner of a recipe's episodes. Arguments as of `EpisodeRunner`."""
        return EpisodeRunner(
            renderer=renderer,
            generator=generator,
            agents=agents,
            limits=recipe.agents,
            reward_timeout_s=recipe.reward_timeout_s,
            toolset=self.toolset,
            interactions=self.interactions,
            reward=self.reward,
            context_length=context_length,
            on_fault=on_fault,
        )

    def close(self) -> None:
        """Release what tools and reward hold for the whole run: threads and processes."""
        self.toolset.close()
        close_reward(self.reward)


def load_renderer(model: ModelConfig, model_path: str, tokenizer: Any = None) -> ChatRenderer:
    """Return the renderer of a recipe's model.

    Args:
        model_path: local folder of the model.
        tokenizer: if it is loaded already.

    Raises:
        ModelError: tokenizer or template cannot be used.
    """
    trust = model.trust_remote_code
    return ChatRenderer(
        tokenizer or load_tokenizer(model_path, trust_remote_code=trust),
        chat_template=read_template(model.chat_template, "model.chat_template"),
        tool_format=model.tool_format,
        chat_template_kwargs=model.chat_template_kwargs,
        tool_role=model.tool_role,
        images=load_image_tokens(model_path, trust_remote_code=trust),
    )


def run_client(rollout: RolloutConfig, url: str, *, token: str | None, max_in_flight: int) -> GenerateClient:
    """Return the client of a run's episodes.

    Args:
        token: the server's bearer token.
        max_in_flight: requests that may be in flight at once.
    """
    return GenerateClient(
        url,
        token=token,
        timeout_s=rollout.request_timeout_s,
        retries=rollout.retries,
        outage_s=rollout.start_timeout_s,
        max_connections=max_in_flight,
        context_headers=trace_headers,
    )
