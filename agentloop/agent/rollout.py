"""Inference without a trainer: run an agent loop over rows against a served model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from agentloop.agent.base import AgentLoop
from agentloop.agent.loading import load_agent
from agentloop.agent.runner import EpisodeRunner
from agentloop.chat import ChatRenderer, load_tokenizer
from agentloop.chat.images import load_image_tokens
from agentloop.chat.proof.proof import prove
from agentloop.client.client import GenerateClient
from agentloop.config import AgentConfig, RewardConfig, SamplingConfig
from agentloop.data import load_tasks
from agentloop.errors import ConfigError
from agentloop.interaction.loading import Interactions, load_interactions
from agentloop.model_folder import ModelFolder
from agentloop.reward.loading import close_reward, load_reward
from agentloop.tool.loading import load_toolset
from agentloop.tool.session import Toolset
from agentloop.types import Task, Trajectory

SINGLE_TURN = "single_turn_agent"
"""The only agent that never continues a turn, so that any template will do."""

PROBES = 40
"""Probe conversations of the template's proof; they take a third of a second."""


async def rollout(
    url: str,
    rows: str | Sequence[Task],
    *,
    model: str | Path,
    agent: str | type[AgentLoop] = "tool_agent",
    tools: str | Path | None = None,
    interactions: str | Path | None = None,
    reward: str | None = None,
    sampling: SamplingConfig | None = None,
    limits: AgentConfig | None = None,
    samples: int = 1,
    max_rows: int | None = None,
    max_in_flight: int = 64,
    seed: int = 0,
    token: str | None = None,
) -> AsyncIterator[list[Trajectory]]:
    """Run an agent loop over rows, and yield each episode when it finishes.

    Failed episodes are yielded too, with `status` and `error`; they do not stop the others. Leaving
    the loop early cancels the episodes that are still running.

    Args:
        url: a rollout server (`agentloop serve`), or a plain SGLang server.
        rows: a data source as in `data.train` of a recipe (a file, `data.py:function`, `hub:...`),
            or tasks.
        model: folder or hub id of the served model, for its tokenizer and chat template.
        agent: name of an installed agent loop, for rows without `agent_name`; or a class, for all
            rows.
        tools, interactions: YAML files.
        reward: `path.py:function`, or a registered name; None: the sum of the step rewards.
        sampling: default: temperature 1, 64 tokens per turn.
        limits: turns, tokens, calls and seconds of an episode.
        samples: episodes per row.
        max_in_flight: episodes that run at the same time.
        seed: equal seeds sample equal tokens, if the server is deterministic.
        token: bearer token of the server.

    Yields:
        The trajectories of one episode, the main one last.

    Raises:
        UserError: the model, its template, a row, a tool or an agent cannot be used.
        ServerError: the server cannot be reached.
    """
    client = GenerateClient(url, token=token, max_connections=max_in_flight)
    folder = ModelFolder.resolve(str(model))
    tokenizer_path = str(folder.path)
    renderer = ChatRenderer(load_tokenizer(tokenizer_path), images=load_image_tokens(tokenizer_path))
    toolset = load_toolset(Path(tools)) if tools is not None else Toolset()
    named = load_interactions(Path(interactions)) if interactions is not None else Interactions()
    scorer = load_reward(RewardConfig(function=reward) if reward is not None else None)

    tasks = load_tasks(rows, "rows", _name(agent)) if isinstance(rows, str) else rows
    tasks = tasks[:max_rows]
    agents = {task.agent_name: load_agent(task.agent_name) for task in tasks} if isinstance(agent, str) else {}

    # A template that cannot continue sampled turns is refused before anything is sampled.
    proof = prove(renderer, toolset.schemas or None, count=PROBES)
    if set(agents) != {SINGLE_TURN}:
        system = any(message["role"] == "system" for task in tasks for message in task.prompt)
        proof.require(tools=bool(toolset.schemas), users=bool(named.named), system=system)

    running: set[asyncio.Task[list[Trajectory]]] = set()
    try:
        context_length = await client.context_length() or folder.context_length
        if context_length is None:
            raise ConfigError(
                f"neither {url} nor {model} gives the context length", "add max_position_embeddings to config.json"
            )
        runner = EpisodeRunner(
            renderer=renderer,
            generator=client,
            agents=agents if isinstance(agent, str) else _Everywhere(agent),
            toolset=toolset,
            interactions=named,
            reward=scorer,
            limits=dict.fromkeys({task.agent_name for task in tasks}, limits or AgentConfig()),
            context_length=context_length,
        )
        jobs = (
            runner.run(
                task,
                group_id=str(index),
                sample_index=sample,
                sampling=sampling or SamplingConfig(),
                seed=seed + index * samples + sample,
            )
            for index, task in enumerate(tasks)
            for sample in range(samples)
        )

        exhausted = False
        while running or not exhausted:
            while len(running) < max_in_flight and not exhausted:
                job = next(jobs, None)
                exhausted = job is None
                if job is not None:
                    running.add(asyncio.create_task(job))
            if running:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for finished in done:
                    yield finished.result()
    finally:
        for task_left in running:
            task_left.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        toolset.close()
        close_reward(scorer)
        await client.close()


class _Everywhere(dict[str, type[AgentLoop]]):
    """One agent loop for every `agent_name`."""

    def __init__(self, agent: type[AgentLoop]) -> None:
        super().__init__()
        self._agent = agent

    def __missing__(self, name: str) -> type[AgentLoop]:
        return self._agent


def _name(agent: str | type[AgentLoop]) -> str:
    return agent if isinstance(agent, str) else agent.__name__
