"""Everything that can be wrong is found here, before a process starts: model, template, rows, agents, tools, reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from agentloop.chat import ChatRenderer, load_tokenizer
from agentloop.chat.images import load_image_tokens
from agentloop.chat.proof import Proof, Verdict, prove
from agentloop.client import GenerateClient
from agentloop.config import Recipe
from agentloop.data import RowOrder, check_agents, drop_overlong, load_tasks
from agentloop.errors import ModelError, ServerError
from agentloop.interaction import Interactions, load_interactions
from agentloop.loop import AgentLoop
from agentloop.registry import AGENTS, load_agent, registered
from agentloop.rewards import RewardFunction, close_reward, load_reward
from agentloop.runner import EpisodeRunner
from agentloop.toolset import Toolset, load_toolset
from agentloop.types import Task, Trajectory
from trainer.console import Console


@dataclass
class Prepared:
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
        return {
            "step": step,
            "task_id": trajectory.task_id,
            "reward": trajectory.reward,
            "stop_reason": trajectory.stop_reason.value,
            "messages": trajectory.messages,
            "expected": next((t.ground_truth for t in self.train if t.task_id == trajectory.task_id), None),
        }


SINGLE_TURN = "single_turn_agent"
"""The one agent that nothing has to follow a turn for."""

QUICK_PROOF = 40
"""Conversations of the proof at the start of a run: a third of a second. `agentloop check` tries 200."""


def prepare(recipe: Recipe, console: Console, *, conversations: int = QUICK_PROOF) -> Prepared:
    """Load and check all that a run needs.

    Args:
        conversations: how many the chat template is tried on.

    Raises:
        UserError: what is wrong, and what to do.
    """
    with console.phase("load tokenizer and template"):
        model_path = resolve_model(recipe.model.path)
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
    with console.phase("load and check rows"):
        known = registered(AGENTS)
        splits: dict[str, list[Task]] = {"train": [], "val": []}
        for split, source in (("train", recipe.data.train), ("val", recipe.data.val)):
            if source is None:
                continue
            key = f"data.{split}"
            tasks, without_agent = load_tasks(source, key, recipe.data.default_agent)
            check_agents(tasks, known, key)
            answered |= interactions.check(tasks, key)
            if split == "val" and recipe.eval.max_rows is not None:
                tasks = tasks[: recipe.eval.max_rows]
            kept = drop_overlong(
                tasks,
                renderer,
                toolset.schemas or None,
                recipe.data.max_prompt_tokens,
                recipe.data.overlong,
                key,
            )
            if without_agent:
                console.notice(f"{key}: {without_agent} rows name no agent; they run {recipe.data.default_agent}")
            if len(kept) < len(tasks):
                console.notice(
                    f"{key}: {len(tasks) - len(kept)} of {len(tasks)} rows left out, their prompts are longer than "
                    f"data.max_prompt_tokens {recipe.data.max_prompt_tokens}"
                )
            splits[split] = kept
        names = sorted({task.agent_name for tasks in splits.values() for task in tasks})
        agents = {name: load_agent(name) for name in names}
    with console.phase("prove chat template"):
        proof = prove(renderer, toolset.schemas or None, count=conversations)
        if names != [SINGLE_TURN]:
            rows = [*splits["train"], *splits["val"]]
            system = any(task.prompt[0]["role"] == "system" for task in rows)
            proof.require(tools=bool(toolset.schemas), users=bool(answered), system=system)
    for notice in _said_of(proof):
        console.notice(notice)
    train = splits["train"]
    return Prepared(
        recipe=recipe,
        model_path=model_path,
        renderer=renderer,
        proof=proof,
        agents=agents,
        toolset=toolset,
        interactions=interactions,
        reward=reward,
        train=train,
        val=splits["val"],
        rows=RowOrder(len(train), recipe.seed_for("data"), shuffle=recipe.data.shuffle),
        total_steps=recipe.run.steps or max(1, (recipe.run.epochs or 1) * len(train) // recipe.rollout.batch_size),
    )


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


def resolve_model(path: str) -> str:
    """The local folder of a model: `path` itself, or the downloaded snapshot of a hub id.

    Raises:
        ModelError: neither is there.
    """
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.path {path} holds no config.json", "give the folder of a Hugging Face model")
        return str(folder.resolve())
    if folder.is_absolute() or path.startswith("."):
        raise ModelError(f"model.path {path} does not exist", "give the folder of a Hugging Face model, or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    try:
        return str(snapshot_download(path, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError, httpx.HTTPError) as exc:
        reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise ModelError(
            f"model.path {path} is no folder and cannot be downloaded from the hub: {reason}",
            "give the folder of a Hugging Face model, or the id of a model that can be reached",
        ) from exc


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
