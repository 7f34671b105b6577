"""Everything that can be wrong is found here, before a process starts: model, template, rows, agents, tools, reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from agentloop.agent.base import AgentLoop
from agentloop.agent.loading import load_agent
from agentloop.agent.runner import EpisodeRunner
from agentloop.chat import ChatRenderer, load_tokenizer
from agentloop.chat.images import load_image_tokens
from agentloop.chat.proof.proof import Proof, Verdict, prove
from agentloop.client.client import GenerateClient
from agentloop.config import Recipe
from agentloop.data import RowOrder, ValidatedRows, check_tasks, load_tasks
from agentloop.errors import ModelError, ServerError
from agentloop.interaction.base import Interactions, load_interactions
from agentloop.model_folder import ModelFolder
from agentloop.registry import AGENTS, registered
from agentloop.reward.loading import RewardFunction, close_reward, load_reward
from agentloop.tool.session import Toolset, load_toolset
from agentloop.types import Task, Trajectory
from trainer.console.console import Console


@dataclass
class RunInputs:
    """What a run works with. `runner` exists between `connect` and `disconnect`."""

    recipe: Recipe
    model_path: str
    renderer: ChatRenderer
    proof: Proof
    agents: dict[str, type[AgentLoop]]
    toolset: Toolset
    interactions: Interactions
    reward: RewardFunction | None
    train: Sequence[Task]
    val: Sequence[Task]
    rows: RowOrder
    total_steps: int
    places: Mapping[str, int] = field(default_factory=dict)
    _client: GenerateClient | None = None
    _runner: EpisodeRunner | None = field(default=None, repr=False)

    @property
    def runner(self) -> EpisodeRunner:
        assert self._runner is not None, "connect() comes first"
        return self._runner

    async def connect(self, url: str, *, max_concurrent: int) -> None:
        """Make a client of the server at `url` and the runner that uses it.

        Raises:
            ServerError: the server does not say how long its context is.
        """
        rollout = self.recipe.rollout
        self._client = GenerateClient(
            url,
            token=rollout.token,
            timeout_s=rollout.request_timeout_s,
            retries=rollout.retries,
            outage_s=rollout.start_timeout_s,
            max_connections=max_concurrent,
        )
        self._runner = EpisodeRunner(
            renderer=self.renderer,
            generator=self._client,
            agents=self.agents,
            recipe=self.recipe,
            toolset=self.toolset,
            interactions=self.interactions,
            reward=self.reward,
            context_length=await _context_length(url, rollout.token),
        )

    async def disconnect(self) -> None:
        self.toolset.close()
        close_reward(self.reward)
        if self._client is not None:
            await self._client.close()

    def sample(self, trajectory: Trajectory, step: int) -> dict[str, Any]:
        """A trajectory for the console: what was asked, what was said, what it was worth."""
        place = self.places.get(trajectory.task_id)
        return {
            "step": step,
            "task_id": trajectory.task_id,
            "reward": trajectory.reward,
            "stop_reason": trajectory.stop_reason.value,
            "messages": trajectory.messages,
            "expected": None if place is None else self.train[place].ground_truth,
        }


SINGLE_TURN = "single_turn_agent"
"""The one agent that nothing has to follow a turn for."""

QUICK_PROOF = 40
"""Conversations of the proof at the start of a run: a third of a second. `agentloop check` tries 200."""


def prepare(recipe: Recipe, console: Console, *, conversations: int = QUICK_PROOF, train: bool = True) -> RunInputs:
    """Load and check all that a run needs.

    Args:
        train: whether the training rows are needed.
        conversations: how many the chat template is tried on.

    Raises:
        UserError: what is wrong, and what to do.
    """
    with console.phase("load tokenizer and template"):
        model_path = str(ModelFolder.resolve(recipe.model.path).path)
        renderer = ChatRenderer(
            load_tokenizer(model_path),
            chat_template=_read_template(recipe.model.chat_template),
            tool_format=recipe.model.tool_format,
            chat_template_kwargs=recipe.model.chat_template_kwargs,
            tool_role=recipe.model.tool_role,
            images=load_image_tokens(model_path),
        )
    with console.phase("load tools and reward"):
        toolset = load_toolset(recipe.tools) if recipe.tools else Toolset()
        reward = load_reward(recipe.reward)
        interactions = load_interactions(recipe.interactions) if recipe.interactions else Interactions()
        answered: set[str] = set()
    splits: dict[str, ValidatedRows] = {}
    for split, source in (("train", recipe.data.train), ("val", recipe.data.val)):
        if source is None or (split == "train" and not train):
            continue

        def check(task: Task, where: str) -> None:
            name = interactions.check(task, where)
            if name is not None:
                answered.add(name)

        with console.phase(f"load and check {split} rows"):
            splits[split] = _checked(recipe, split, source, renderer, toolset.schemas or None, check, console)
        for notice in _said_of_rows(recipe, split, splits[split]):
            console.notice(notice)
    names = sorted(set().union(*(found.agents for found in splits.values())))
    agents = {name: load_agent(name) for name in names}
    with console.phase("prove chat template"):
        proof = prove(renderer, toolset.schemas or None, count=conversations)
        if names != [SINGLE_TURN]:
            system = any(found.system for found in splits.values())
            proof.require(tools=bool(toolset.schemas), users=bool(answered), system=system)
    for notice in [*_said_of(proof), *_without_effect(recipe)]:
        console.notice(notice)
    rows: Sequence[Task] = splits["train"].tasks if train else []
    return RunInputs(
        recipe=recipe,
        model_path=model_path,
        renderer=renderer,
        proof=proof,
        agents=agents,
        toolset=toolset,
        interactions=interactions,
        reward=reward,
        train=rows,
        places=splits["train"].places if train else {},
        val=splits["val"].tasks if "val" in splits else [],
        rows=RowOrder(len(rows), recipe.seed_for("data"), shuffle=recipe.data.shuffle),
        total_steps=recipe.run.steps or max(1, (recipe.run.epochs or 1) * len(rows) // recipe.rollout.batch_size),
    )


def _checked(
    recipe: Recipe,
    split: str,
    source: str | list[str],
    renderer: ChatRenderer,
    schemas: list[dict[str, Any]] | None,
    check: Callable[[Task, str], None],
    console: Console,
) -> ValidatedRows:
    """The rows of a split that fit, after a look at each of them."""
    data = recipe.data
    key = f"data.{split}"
    tasks = load_tasks(source, key, data.default_agent, data.options)
    if split == "val" and recipe.eval.max_rows is not None:
        tasks = tasks[: recipe.eval.max_rows]
    return check_tasks(
        tasks,
        key,
        renderer=renderer,
        schemas=schemas,
        limit=data.max_prompt_tokens,
        overlong=data.overlong,
        agents=registered(AGENTS),
        check=check,
        on_row=console.phase_progress,
    )


def _said_of_rows(recipe: Recipe, split: str, found: ValidatedRows) -> list[str]:
    """What a user should know of rows that are not as they were written."""
    data = recipe.data
    said = []
    if found.without_agent:
        said.append(f"data.{split}: {found.without_agent} rows name no agent; they run {data.default_agent}")
    rows = len(found.tasks) + found.dropped
    longer = f"their prompts are longer than data.max_prompt_tokens {data.max_prompt_tokens}"
    if found.dropped:
        said.append(f"data.{split}: {found.dropped} of {rows} rows left out, {longer}")
    if found.cut:
        said.append(f"data.{split}: {found.cut} of {rows} rows cut, {longer}")
    return said


def _said_of(proof: Proof) -> list[str]:
    """What a user should know of a template that is not refused."""
    said = []
    if proof.verdict is Verdict.KEPT and proof.differences:
        first = proof.differences[0]
        said.append(
            "the chat template writes earlier turns in another way once a conversation goes on; they stay as they were "
            f"sampled: {first.sampled!r} would become {first.rewritten!r} (`agentloop template` shows more)"
        )
    if "tool schemas" in proof.abilities.missing:
        said.append(f"tool schemas: {proof.abilities.missing['tool schemas']}")
    return said


def _without_effect(recipe: Recipe) -> list[str]:
    """Settings of the trainer that do nothing in this run."""
    trainer = recipe.trainer
    said = []
    if trainer.device == "cpu" and (trainer.fsdp.offload_policy or trainer.fsdp.offload_reference):
        said.append("trainer.fsdp.offload_*: trainer.device is cpu, where everything lives in host memory anyway")
    if trainer.fsdp.offload_reference and (trainer.lora is not None or not trainer.algorithm.kl_coef):
        said.append("trainer.fsdp.offload_reference: this run keeps no reference of its own")
    return said


def _read_template(path: Path | None) -> str | None:
    if path is None:
        return None
    if not path.is_file():
        raise ModelError(f"model.chat_template {path} does not exist", "give a Jinja file")
    return path.read_text(encoding="utf-8")


async def _context_length(url: str, token: str | None) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=30, trust_env=False) as http:
        answer = await http.get("/server_info")
    if answer.status_code != 200 or "context_length" not in answer.json():
        raise ServerError(f"{url}/server_info answered {answer.status_code} and no context_length: {answer.text[:200]}")
    return int(answer.json()["context_length"])
