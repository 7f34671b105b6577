"""Load and check everything a run needs, before a process starts -> `RunInputs`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentloop.agent.base import AgentLoop
from agentloop.agent.code import RunCode, load_renderer, run_client
from agentloop.agent.runner import OnFault
from agentloop.chat import ChatRenderer, check_vocabulary, load_tokenizer
from agentloop.chat.proof.proof import Proof, prove
from agentloop.chat.proof.schemas import check_schemas
from agentloop.config import Recipe
from agentloop.data import RowOrder, Tasks, ValidatedRows, check_tasks, load_tasks
from agentloop.errors import DataError, ModelError, ServerError
from agentloop.files import is_file
from agentloop.interaction.loading import Interactions
from agentloop.launch.base import Launcher
from agentloop.model_folder import ModelFolder, check_tensors, find_model
from agentloop.model_folder.hub import may_be_hub_id
from agentloop.tool.session import Toolset
from agentloop.trace.export.turns import turns_of_messages
from agentloop.types import Task, Trajectory
from agentloop.worker.pool import WorkerPool
from trainer.console.console import Console
from trainer.rollouts.image_canary import check_images_are_seen
from trainer.rollouts.producer import RunsEpisodes
from trainer.run.checkpoints import find_adapters
from trainer.run.notices import (
    row_notices,
    shared_gpus,
    small_data_text,
    template_notices,
    unreadable_text,
    unused_agents,
    unused_settings,
)
from trainer.run.preflight.code import RowChecks


@dataclass(frozen=True)
class RunInputs:
    """Everything that preflight loaded and checked for a run.

    Attributes:
        model_path: local folder of the model.
        agents: those that rows name.
        train: the training rows; empty for an evaluation alone.
        val: the validation rows.
        rows: the order of the training rows.
        total_steps: training steps of the whole run.
        places: index in `train` of a row, by task id.
        adapters: checkpoint whose adapters the policy starts with; None: new ones, or none at all.
    """

    recipe: Recipe
    model_path: str
    renderer: ChatRenderer
    proof: Proof
    agents: dict[str, type[AgentLoop]]
    code: RunCode
    train: Sequence[Task]
    val: Sequence[Task]
    rows: RowOrder
    total_steps: int
    places: Mapping[str, int]
    adapters: Path | None = None

    @property
    def toolset(self) -> Toolset:
        """The tools."""
        return self.code.toolset

    @property
    def interactions(self) -> Interactions:
        """The interactions that rows may name."""
        return self.code.interactions

    @contextlib.asynccontextmanager
    async def workers(
        self, log_dir: Path, warn: Callable[[str], None], launcher: Launcher | None = None
    ) -> AsyncIterator[WorkerPool | None]:
        """Begin to start the agent workers of the recipe, and end them afterwards; None: episodes
        run in this process.

        Args:
            log_dir: gets a log of each.
            warn: called with each warning.
            launcher: starts them; None: as children of this process.
        """
        if not self.recipe.cluster.agents.workers:
            yield None
            return
        async with WorkerPool(self.recipe, self.model_path, log_dir=log_dir, warn=warn, launcher=launcher) as pool:
            yield pool

    @contextlib.asynccontextmanager
    async def runner(
        self,
        url: str,
        *,
        token: str | None,
        max_in_flight: int,
        on_fault: OnFault = lambda _fault, _row, _episode: None,
        workers: WorkerPool | None = None,
    ) -> AsyncIterator[RunsEpisodes]:
        """Yield a runner of episodes on the server at `url`; close its client, the tools and the
        reward afterwards.

        Args:
            token: the server's bearer token.
            max_in_flight: requests that may be in flight at once.
            on_fault: called with each exception of user code.
            workers: the processes that run the episodes; None: this one.

        Raises:
            ServerError: the server does not report its context length.
            UserError: a worker cannot load what the recipe names.
            WorkerError: a worker did not start.
        """
        client = run_client(self.recipe.rollout, url, token=token, max_in_flight=max_in_flight)
        try:
            context_length = await client.context_length()
            if context_length is None:
                raise ServerError(f"{url}/server_info has no context_length", "serve the model with agentloop serve")
            if self.recipe.rollout.image_canary:
                rows = self.train or self.val
                await check_images_are_seen(client, self.renderer, rows, self.toolset.schemas or None, context_length)
            if workers is not None:
                await workers.serve(
                    url, token=token, context_length=context_length, max_in_flight=max_in_flight, on_fault=on_fault
                )
                yield workers
                return
            yield self.code.runner(
                self.recipe,
                self.renderer,
                client,
                agents=self.agents,
                context_length=context_length,
                on_fault=on_fault,
            )
        finally:
            self.code.close()
            await client.close()

    def sample(self, trajectory: Trajectory, step: int) -> dict[str, Any]:
        """Return a trajectory as the console shows it: conversation, reward, expected answer."""
        place = self.places.get(trajectory.task_id)
        turns = turns_of_messages(trajectory.messages, trajectory.turns)
        return {
            "step": step,
            "task_id": trajectory.task_id,
            "reward": trajectory.reward,
            "stop_reason": trajectory.stop_reason.value,
            "messages": trajectory.messages,
            "malformed_calls": {at: [call.text for call in turn.malformed_calls] for at, turn in turns.items()},
            "expected": None if place is None else self.train[place].ground_truth,
        }


SINGLE_TURN = "single_turn_agent"
"""The only agent that never continues a turn, so that any template will do."""

QUICK_PROOF = 40
"""Probe conversations at the start of a run: a third of a second. `agentloop check` uses 200."""


def prepare(
    recipe: Recipe,
    console: Console,
    *,
    conversations: int = QUICK_PROOF,
    train: bool = True,
    compare_tensors: bool = False,
    weights: bool = True,
) -> RunInputs:
    """Load and check everything a run needs; print notices and warnings.

    Args:
        conversations: number of probe conversations for the chat template.
        train: whether to load the training rows.
        compare_tensors: compare the model's tensors with its architecture now, which takes seconds;
            trainer and server do so when they load it.
        weights: whether the files of the weights have to be there.

    Raises:
        UserError: something is wrong; the message has the fix.
    """
    folder = _checked_model(recipe, console, train=train, weights=weights)
    model_path = str(folder.path)
    trust = recipe.model.trust_remote_code
    with console.phase("load tokenizer and template"):
        tokenizer = load_tokenizer(model_path, trust_remote_code=trust)
        beyond = check_vocabulary(tokenizer, ModelFolder(Path(model_path)).vocab_size)
        renderer = load_renderer(recipe.model, model_path, tokenizer)

    if beyond:
        console.warn(beyond)
    with console.phase("load agents, tools and reward"):
        code = RunCode.load(recipe)
    toolset = code.toolset
    check_schemas(renderer, toolset.schemas)  # before rows are rendered with them

    context = _context_length(recipe, model_path)
    answered: set[str] = set()
    splits: dict[str, ValidatedRows] = {}
    for split, source in (("train", recipe.data.train), ("val", recipe.data.val)):
        if source is None or (split == "train" and not train):
            continue

        checks = RowChecks(code, f"data.{split}", answered, sent=recipe.cluster.agents.workers > 0)
        with console.phase(f"load and check {split} rows"):
            splits[split] = _checked(recipe, split, source, renderer, checks, console, context)
            checks.require_truth(recipe)
        for notice in row_notices(recipe.data, split, splits[split]):
            console.notice(notice)
        for warning in (unreadable_text(split, splits[split]), *checks.warnings()):
            if warning is not None:
                console.warn(warning)

    names = sorted(set().union(*(found.agents for found in splits.values())))
    for warning in unused_agents(recipe, splits.values()):
        console.warn(warning)
    with console.phase("prove chat template"):
        proof = prove(renderer, toolset.schemas or None, count=conversations)
        if names != [SINGLE_TURN]:
            system = any(found.system for found in splits.values())
            proof.require(tools=bool(toolset.schemas), users=bool(answered), system=system)
    for notice in [*template_notices(proof), *unused_settings(recipe.trainer)]:
        console.notice(notice)
    if train and (shared := shared_gpus(recipe)) is not None:
        console.warn(shared)

    # Last, because it takes longest: what is wrong elsewhere is reported before.
    if compare_tensors and (train or recipe.rollout.url is None):
        with console.phase("compare the model's tensors with its architecture"):
            check_tensors(folder, trust_remote_code=trust)

    rows: Sequence[Task] = splits["train"].tasks if train else []
    if train and len(rows) < recipe.rollout.batch_size:
        console.warn(small_data_text(len(rows), recipe.rollout.batch_size))
    return RunInputs(
        recipe=recipe,
        model_path=model_path,
        renderer=renderer,
        proof=proof,
        adapters=find_adapters(recipe.trainer.lora, model_path),
        agents={name: code.agents.get(name, "a row") for name in names},
        code=code,
        train=rows,
        places=splits["train"].places if train else {},
        val=splits["val"].tasks if "val" in splits else [],
        rows=RowOrder(len(rows), recipe.seed_for("data"), shuffle=recipe.data.shuffle),
        total_steps=recipe.run.steps or max(1, (recipe.run.epochs or 1) * len(rows) // recipe.rollout.batch_size),
    )


def _refuse_missing(recipe: Recipe, key: str, source: str | list[str]) -> None:
    """Refuse a file that does not exist while one of that name is beside the recipe.

    Raises:
        DataError: names both.
    """
    for name in [source] if isinstance(source, str) else source:
        path = Path(name)
        beside = None if recipe.folder is None else recipe.folder / path.name
        if path.suffix in (".jsonl", ".parquet") and beside is not None and not path.exists() and beside.is_file():
            raise DataError(
                f"{key}: {name} does not exist",
                f"set {key}={beside}, which is beside the recipe; paths on the command line are relative to the "
                "working directory",
            )


def _checked_model(recipe: Recipe, console: Console, *, train: bool, weights: bool) -> ModelFolder:
    """Find the model's folder and check its files."""
    model, trust = recipe.model, recipe.model.trust_remote_code
    # Evaluated on a server that runs already, the model is only a tokenizer here.
    weights = weights and (train or recipe.rollout.url is None)
    quantized = not train and recipe.rollout.engine == "sglang"
    with console.phase("check model files"):
        try:
            return find_model(model.path, console.warn, trust_remote_code=trust, weights=weights, quantized=quantized)
        except ModelError as exc:
            program = recipe.folder / "model.py"
            if may_be_hub_id(model.path) or Path(model.path).exists() or not is_file(program):
                raise
            raise ModelError(exc.message, f"write it: python {program} --out {model.path}; or {exc.hint}") from exc


def _checked(
    recipe: Recipe,
    split: str,
    source: str | list[str],
    renderer: ChatRenderer,
    checks: RowChecks,
    console: Console,
    context: int | None,
) -> ValidatedRows:
    """Load the rows of a split and check each of them."""
    data = recipe.data
    return check_tasks(
        load_split(recipe, split, source, takes_images=renderer.image_token is not None),
        checks.key,
        renderer=renderer,
        schemas=checks.code.toolset.schemas or None,
        limit=data.max_prompt_tokens,
        overlong=data.overlong,
        context=context,
        check=checks.check,
        on_row=console.phase_progress,
    )


def load_split(recipe: Recipe, split: str, source: str | list[str], *, takes_images: bool = False) -> Tasks:
    """Load the rows of a split, as many as the run uses.

    Args:
        takes_images: whether the model takes images; if not, or unknown, see `Tasks`.

    Raises:
        DataError: they cannot be read; says how to prepare them.
    """
    _refuse_missing(recipe, f"data.{split}", source)
    try:
        agent, options = recipe.data.default_agent, recipe.data.options
        tasks = load_tasks(source, f"data.{split}", agent, options, takes_images=takes_images)
    except DataError as exc:
        raise DataError(exc.message, _how_to_prepare(recipe, source) or exc.hint) from exc
    return tasks[: recipe.eval.max_rows] if split == "val" and recipe.eval.max_rows is not None else tasks


def _how_to_prepare(recipe: Recipe, source: str | list[str]) -> str | None:
    """Return the command that writes a missing file of rows, if the recipe's data.py can."""
    names = [Path(name) for name in ([source] if isinstance(source, str) else source)]
    missing = next((name for name in names if name.suffix in (".jsonl", ".parquet") and not is_file(name)), None)
    code = recipe.folder / "data.py"
    if missing is None or not is_file(code):
        return None
    found = re.search(r"^def prepare\(([^)]*)", code.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    if found is None:
        return None
    origin = " --source <folder or hub id>" if "source" in found[1] else ""
    return f"write it: agentloop prepare {recipe.folder}{origin} --out {missing.parent}"


def _context_length(recipe: Recipe, model_path: str) -> int | None:
    """Return the longest sequence that the server will accept; None if the model does not say."""
    lengths = (recipe.rollout.context_length, ModelFolder(Path(model_path)).context_length)
    return min((length for length in lengths if length is not None), default=None)
