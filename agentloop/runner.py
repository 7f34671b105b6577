"""One sample from task to scored trajectories. Whatever happens in an episode stays that episode's own."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Mapping
from typing import Any

from agentloop.chat import ChatRenderer
from agentloop.client import Generator
from agentloop.config import Recipe, SamplingConfig
from agentloop.episode import Episode, EpisodeEnd
from agentloop.errors import RewardError, TokenLawError
from agentloop.loop import AgentLoop
from agentloop.rewards import RewardFunction
from agentloop.toolset import Toolset
from agentloop.types import EpisodeStatus, StopReason, Task, Trajectory


class EpisodeRunner:
    """Runs episodes for a producer.

    Args:
        agents: loop class by `agent_name`.
        recipe: limits by agent, reward timeout.
        reward: scores an episode; None: the sum of the tools' step rewards.
        context_length: of the server's model.
    """

    def __init__(
        self,
        *,
        renderer: ChatRenderer,
        generator: Generator,
        agents: Mapping[str, type[AgentLoop]],
        recipe: Recipe,
        toolset: Toolset,
        reward: RewardFunction | None,
        context_length: int,
    ) -> None:
        self._renderer = renderer
        self._generator = generator
        self._agents = agents
        self._recipe = recipe
        self._toolset = toolset
        self._reward = reward
        self._context_length = context_length

    async def run(
        self,
        task: Task,
        *,
        group_id: str,
        sample_index: int,
        sampling: SamplingConfig,
        seed: int | None = None,
    ) -> list[Trajectory]:
        """Run one episode; its trajectories, the main one last. A failure is a status, never an exception."""
        config = self._recipe.agent(task.agent_name)
        session = self._toolset.session(task)
        episode = Episode(
            task,
            renderer=self._renderer,
            generator=self._generator,
            tools=session,
            tool_schemas=self._toolset.schemas,
            config=config,
            sampling=sampling,
            context_length=self._context_length,
            seed=seed,
            group_id=group_id,
            sample_index=sample_index,
        )
        error: str | None = None
        parts: dict[str, float] = {}
        try:
            async with asyncio.timeout(config.episode_timeout_s):
                with contextlib.suppress(EpisodeEnd):  # the episode has noted the reason
                    await self._agents[task.agent_name](config.options).run(episode)
            parts = await session.rewards()
        except TimeoutError:
            episode.stop_reason = StopReason.TIMEOUT
        except Exception as exc:  # noqa: BLE001  # one episode's exception never ends its batch
            episode.stop_reason = StopReason.ERROR
            error = f"{type(exc).__name__}: {exc}"
        finally:
            await asyncio.shield(session.close())
        trajectories = episode.trajectories() or [_empty(episode)]
        await self._score(task, episode, trajectories, parts, error)
        for trajectory in trajectories:
            trajectory.agent_name = task.agent_name
            trajectory.task_id = task.task_id
            trajectory.data_source = task.data_source
            trajectory.group_id = group_id
            trajectory.sample_index = sample_index
        return trajectories

    async def _score(
        self,
        task: Task,
        episode: Episode,
        trajectories: list[Trajectory],
        parts: dict[str, float],
        error: str | None,
    ) -> None:
        main = trajectories[-1]
        reward: float | None = None
        begin = time.perf_counter()
        if error is None:
            try:
                for trajectory in trajectories:
                    trajectory.check()
                reward, own_parts = await self._call_reward(task, episode, main)
                parts = {**parts, **own_parts}
            except TokenLawError as exc:
                for trajectory in trajectories:
                    trajectory.status, trajectory.error = EpisodeStatus.REJECTED, str(exc)
                return
            except RewardError as exc:
                error = str(exc)
        main.metrics["reward_s"] = time.perf_counter() - begin
        for trajectory in trajectories:
            trajectory.reward, trajectory.reward_parts = reward, parts
            if error is not None:
                trajectory.status, trajectory.error = EpisodeStatus.FAILED, error

    async def _call_reward(
        self, task: Task, episode: Episode, main: Trajectory
    ) -> tuple[float, dict[str, float]]:
        """Score an episode.

        Raises:
            RewardError: the function raised, took too long or gave no finite number.
        """
        if self._reward is None:
            return float(sum(episode.tool_rewards)), {}
        text = main.turns[-1].text if main.turns else ""
        try:
            async with asyncio.timeout(self._recipe.reward_timeout_s):
                result: Any = await self._reward(task, text, main)
        except TimeoutError as exc:
            raise RewardError(f"the reward took longer than {self._recipe.reward_timeout_s:g} s") from exc
        except Exception as exc:
            raise RewardError(f"the reward raised {type(exc).__name__}: {exc}") from exc
        parts = (
            {key: value for key, value in result.items() if key != "score"}
            if isinstance(result, dict)
            else {}
        )
        score = result.get("score") if isinstance(result, dict) else result
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            raise RewardError(
                f"the reward returned {score!r}, which is no finite number", "return a float from it"
            )
        return float(score), {key: float(value) for key, value in parts.items()}


def _empty(episode: Episode) -> Trajectory:
    """Stands for an episode in which nothing was sampled, so that it is counted and traced."""
    return Trajectory(
        [], [], [], [], 0, messages=episode.messages, stop_reason=episode.stop_reason, metrics=episode.metrics
    )
