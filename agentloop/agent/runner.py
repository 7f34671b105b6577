"""Run one sample, from its task to scored trajectories. A failure stays within its episode."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from agentloop.agent.base import AgentLoop
from agentloop.chat import ChatRenderer
from agentloop.client.client import Generator
from agentloop.client.time_limit import TimeLimit
from agentloop.config import AgentConfig, SamplingConfig
from agentloop.episode.budget import Budget, EpisodeEnd
from agentloop.episode.episode import Episode
from agentloop.episode.images import ImageLoader
from agentloop.episode.law import check_episode
from agentloop.episode.shared import Shared
from agentloop.errors import InteractionError, RewardError, TokenLawError, ToolError
from agentloop.faults import Fault, contained
from agentloop.interaction.loading import Interactions
from agentloop.interaction.session import InteractionSession
from agentloop.reward.calling import call_reward
from agentloop.reward.loading import RewardFunction
from agentloop.runtime.isolation import fault_of
from agentloop.runtime.pacing import Pacer
from agentloop.tool.session import ToolSession, Toolset
from agentloop.trace.spans import Recorder, span
from agentloop.types import EpisodeStatus, Outcome, StopReason, Task, Trajectory

OnFault = Callable[[Fault, str, str], None]
"""Called with an exception of user code, the row's task id, and the episode."""

_SOURCES: dict[type[Exception], str] = {
    RewardError: "the reward",
    ToolError: "a tool",
    InteractionError: "the interaction",
}
"""What raised the exception that such an error wraps; anything else comes from the agent."""


class EpisodeRunner:
    """Run episodes for a producer.

    Args:
        agents: loop class by `agent_name`.
        limits: limits and options by `agent_name`; an agent that is not listed has the defaults.
        reward: scores an episode; None: the sum of its step rewards.
        reward_timeout_s: time limit of the reward function, and of the tools' rewards together.
        context_length: of the server's model.
        interactions: the interactions that rows may name; None: no row has one.
        on_fault: called with each exception of user code at the end of its episode: the exception,
            the row's task id, the episode.
    """

    def __init__(
        self,
        *,
        renderer: ChatRenderer,
        generator: Generator,
        agents: Mapping[str, type[AgentLoop]],
        toolset: Toolset,
        reward: RewardFunction | None,
        context_length: int,
        limits: Mapping[str, AgentConfig] | None = None,
        reward_timeout_s: float = 60.0,
        interactions: Interactions | None = None,
        on_fault: OnFault = lambda _fault, _row, _episode: None,
    ) -> None:
        self._renderer = renderer
        self._generator = generator
        self._agents = agents
        self._limits = limits or {}
        self._reward_timeout_s = reward_timeout_s
        self._toolset = toolset
        self._reward = reward
        self._context_length = context_length
        self._interactions = interactions or Interactions()
        self._pacer = Pacer()
        self._images = ImageLoader()
        self._on_fault = on_fault

    async def run(
        self,
        task: Task,
        *,
        group_id: str,
        sample_index: int,
        sampling: SamplingConfig,
        seed: int | None = None,
    ) -> list[Trajectory]:
        """Run one episode; return its trajectories, the main one last. A failure is a status, never
        an exception."""
        await self._pacer.turn()
        config = self._limits.get(task.agent_name) or AgentConfig()
        session = self._toolset.session(task)
        interaction = self._interactions.session(task)
        recorder = Recorder(expected=(EpisodeEnd,))
        shared = Shared(
            task=task,
            renderer=self._renderer,
            generator=self._generator,
            session=session,
            interaction=interaction,
            budget=Budget(config, self._context_length),
            pacer=self._pacer,
            images=self._images,
            config=config,
            sampling=sampling,
            recorder=recorder,
            seed=seed,
            group_id=group_id,
            sample_index=sample_index,
        )
        episode = Episode.start(shared, self._toolset.schemas)

        with recorder:
            error, verdicts = await self._drive(episode, session, interaction)
            trajectories = episode.trajectories()
            begin = time.perf_counter()
            outcome = await self._outcome(task, trajectories, verdicts, error)
        if session.faults:
            outcome = replace(outcome, faults=[*session.faults, *outcome.faults])
        for fault in outcome.faults:
            self._on_fault(fault, task.task_id, shared.session_id)
        trajectories[-1].metrics["reward_s"] = time.perf_counter() - begin
        trajectories[-1].spans = recorder.finish(outcome.error)
        return [trajectory.with_outcome(outcome) for trajectory in trajectories]

    async def _drive(
        self, episode: Episode, session: ToolSession, interaction: InteractionSession | None
    ) -> tuple[Exception | None, dict[str, float]]:
        """Run the agent, take the tools' rewards, and close what the episode opened.

        Returns:
            the exception that ended it, or None; the tools' rewards by name.
        """
        try:
            await self._run_loop(self._agents[episode.task.agent_name](episode.config.options), episode)
            return None, await self._tool_rewards(session)
        except Exception as exc:  # noqa: BLE001  # one episode's exception never ends its batch
            if episode.stop_reason is not StopReason.ABORT:
                episode.stop_reason = StopReason.ERROR
            return exc, {}
        finally:
            await asyncio.shield(_close(session, interaction))

    async def _outcome(
        self, task: Task, trajectories: list[Trajectory], verdicts: dict[str, float], error: Exception | None
    ) -> Outcome:
        """Check an episode against the token law and score it. `error` is the exception that ended
        it, or None."""
        try:
            if error is not None:
                raise error
            check_episode(trajectories, image_token=self._renderer.image_token)
            return await self._score(task, trajectories, verdicts)
        except TokenLawError as exc:
            return Outcome(EpisodeStatus.REJECTED, error=str(exc), broken_rule=exc.rule.value)
        except Exception as exc:  # noqa: BLE001  # one episode's exception never ends its batch
            text = str(exc) if isinstance(exc, RewardError) else f"{type(exc).__name__}: {exc}"
            fault = fault_of(_SOURCES.get(type(exc)) or f"the agent {task.agent_name}", exc)
            return Outcome(EpisodeStatus.FAILED, error=text, faults=[fault] if fault is not None else ())

    @staticmethod
    async def _run_loop(loop: AgentLoop, episode: Episode) -> None:
        """Drive an episode until its loop returns or it reaches a limit, which it records."""
        try:
            async with TimeLimit(episode.config.episode_timeout_s) as clock:
                with contained():
                    await loop.run(episode)
        except EpisodeEnd as end:
            episode.stop_reason = end.reason  # also if the limit was reached in a fork
        except TimeoutError:
            if not clock.expired():
                raise  # not our time limit: something that the loop called timed out
            episode.stop_reason = StopReason.TIMEOUT

    async def _tool_rewards(self, session: ToolSession) -> dict[str, float]:
        try:
            async with asyncio.timeout(self._reward_timeout_s):
                with contained():
                    verdicts = await session.rewards()
        except TimeoutError as exc:
            raise RewardError(
                f"the tools' rewards took longer than {self._reward_timeout_s:g} s", "raise reward_timeout_s"
            ) from exc
        return verdicts

    async def _score(self, task: Task, trajectories: list[Trajectory], verdicts: dict[str, float]) -> Outcome:
        """Return an episode's reward and its parts; `verdicts` holds its tools' rewards by name.

        Raises:
            RewardError: see `call_reward`.
        """
        parts = dict(verdicts)
        steps = [step for trajectory in trajectories for step in trajectory.step_rewards]
        for step in steps:
            parts[step.name] = parts.get(step.name, 0.0) + step.value
        if self._reward is None:
            return Outcome(reward=math.fsum(step.value for step in steps), reward_parts=parts)

        with span("reward", reward="reward") as running:
            verdict = await call_reward(self._reward, task, trajectories[-1], self._reward_timeout_s)
            running.set(score=verdict.score)
        score, answer = verdict.score, verdict.answer
        return Outcome(reward=score, outcome=score, reward_parts=parts | verdict.parts, answer=answer)


async def _close(session: ToolSession, interaction: InteractionSession | None) -> None:
    await session.close()
    if interaction is not None:
        await interaction.close()
