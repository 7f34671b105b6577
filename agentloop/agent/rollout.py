"""Inference without a trainer: run an agent loop over rows against a served model."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import warnings
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

from agentloop.agent.base import AgentLoop
from agentloop.agent.loading import Agents, load_agent
from agentloop.agent.runner import EpisodeRunner
from agentloop.agent.single_turn import SingleTurnAgent
from agentloop.chat import ChatRenderer, load_tokenizer
from agentloop.chat.images import load_image_tokens
from agentloop.chat.proof.proof import prove
from agentloop.client.client import GenerateClient
from agentloop.client.open_files import shortage
from agentloop.config import AgentConfig, RewardConfig, SamplingConfig
from agentloop.data import Tasks, load_tasks
from agentloop.errors import ConfigError
from agentloop.interaction.loading import Interactions, load_interactions
from agentloop.model_folder import CONFIG_FILE, TOKENIZER_FILES, ModelFolder
from agentloop.reward.loading import close_reward, load_reward
from agentloop.tool.loading import load_toolset
from agentloop.tool.session import Toolset
from agentloop.trace import trace_headers
from agentloop.types import Task, Trajectory

DEFAULT_AGENT = "tool_agent"

PROBES = 40
"""Probe conversations of the template's proof; they take a third of a second."""


async def rollout(
    url: str,
    rows: str | Sequence[Task],
    *,
    model: str | Path,
    agent: str | type[AgentLoop] | None = None,
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
    trust_remote_code: bool = False,
) -> AsyncGenerator[list[Trajectory], None]:
    """Run an agent loop over rows, and yield each episode when it finishes.

    Failed episodes are yielded too, with `status` and `error`; they do not stop the others. To
    leave the loop early, use `async with contextlib.aclosing(rollout(...)) as episodes`: it cancels
    the episodes that are still running.

    Args:
        url: a rollout server (`agentloop serve`), or a plain SGLang server.
        rows: a data source as in `data.train` of a recipe (a file, `data.py:function`, `hub:...`),
            or tasks.
        model: folder or hub id of the served model, for its tokenizer and chat template.
        agent: an agent loop for all rows: a registered name, `path.py:Class`, or a class. None: the
            row's `agent_name` chooses; `tool_agent` if it has none.
        tools, interactions: YAML files.
        reward: `path.py:function`, or a registered name; None: the sum of the step rewards.
        sampling: default: temperature 1, 64 tokens per turn.
        limits: turns, tokens, calls and seconds of an episode.
        samples: episodes per row.
        max_in_flight: episodes that run at the same time.
        seed: equal seeds sample equal tokens, if the server is deterministic.
        token: bearer token of the server.
        trust_remote_code: whether Python code of the model's folder may run (its tokenizer).

    Yields:
        The trajectories of one episode, the main one last.

    Raises:
        UserError: the model, its template, a row, a tool or an agent cannot be used.
        ServerError: the server cannot be reached.
    """
    for name, value, least in (("samples", samples, 1), ("max_in_flight", max_in_flight, 1), ("max_rows", max_rows, 0)):
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}", f"give at least {least}")

    if (few := shortage(max_in_flight)) is not None:
        warnings.warn(few, stacklevel=2)
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(
            GenerateClient(url, token=token, max_connections=max_in_flight, context_headers=trace_headers)
        )
        folder = ModelFolder.resolve(str(model), (CONFIG_FILE, *TOKENIZER_FILES, "*.jinja"), key="model")
        model_path = str(folder.path)
        renderer = ChatRenderer(
            load_tokenizer(model_path, trust_remote_code=trust_remote_code),
            images=load_image_tokens(model_path, trust_remote_code=trust_remote_code),
        )
        toolset = load_toolset(Path(tools)) if tools is not None else Toolset()
        stack.callback(toolset.close)
        named = load_interactions(Path(interactions)) if interactions is not None else Interactions()
        scorer = load_reward(RewardConfig(function=reward) if reward is not None else None)
        stack.callback(close_reward, scorer)

        takes_images = renderer.image_token is not None
        tasks = load_tasks(rows, "rows", DEFAULT_AGENT, takes_images=takes_images) if isinstance(rows, str) else rows
        tasks = tasks[:max_rows]
        for index, task in enumerate(tasks):
            where = tasks.where(index) if isinstance(tasks, Tasks) else f"rows[{index}]"
            named.check(task, where)
            toolset.check(task, where)
        names = {task.agent_name for task in tasks}
        if agent is None:
            found = Agents({})
            agents = {name: found.get(name, "a row") for name in names}
        else:
            agents = dict.fromkeys(names, load_agent(agent) if isinstance(agent, str) else agent)

        # A template that cannot continue sampled turns is refused before anything is sampled. Only
        # the single-turn agent needs no continuation.
        proof = prove(renderer, toolset.schemas or None, count=PROBES)
        if set(agents.values()) != {SingleTurnAgent}:
            system = any(message["role"] == "system" for task in tasks for message in task.prompt)
            proof.require(tools=bool(toolset.schemas), users=bool(named.named), system=system)

        context_length = await client.context_length() or folder.context_length
        if context_length is None:
            raise ConfigError(
                f"neither {url} nor {model} gives the context length", "add max_position_embeddings to config.json"
            )
        runner = EpisodeRunner(
            renderer=renderer,
            generator=client,
            agents=agents,
            toolset=toolset,
            interactions=named,
            reward=scorer,
            limits=dict.fromkeys(names, limits or AgentConfig()),
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
        async with contextlib.aclosing(_finished(jobs, max_in_flight)) as episodes:
            async for episode in episodes:
                yield episode


async def _finished(
    jobs: Iterator[Coroutine[Any, Any, list[Trajectory]]], max_in_flight: int
) -> AsyncGenerator[list[Trajectory], None]:
    """Run jobs, `max_in_flight` at a time; yield each result when it is there, cancel the rest."""
    running: set[asyncio.Task[list[Trajectory]]] = set()
    try:
        while True:
            for job in itertools.islice(jobs, max_in_flight - len(running)):
                running.add(asyncio.create_task(job))
            if not running:
                return

            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for finished in done:
                yield finished.result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
