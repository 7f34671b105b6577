"""`agentloop check`: the checks before a run starts, and the proof of its chat template."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from agentloop.agent.code import RunCode
from agentloop.commands.recipes import find_config
from agentloop.commands.template_report import summary
from agentloop.config import Recipe, SftRecipe
from agentloop.config.loading import load_config, read_config
from agentloop.errors import DataError, ImageError, ModelError
from agentloop.interaction.loading import Interactions
from agentloop.model_folder import ModelFolder, check_target, check_tensors, find_model
from agentloop.model_folder.hub import may_be_hub_id
from agentloop.text import counted
from agentloop.tool.services import unreachable
from agentloop.tool.session import Toolset
from agentloop.trace.exporting import ExportRun, load_destinations
from agentloop.types import Task
from trainer.console.console import Console
from trainer.loggers import check_loggers
from trainer.run.notices import ignores_step_rewards, step_reward_sources, step_reward_text
from trainer.run.preflight import RowChecks, RunInputs, load_split, prepare
from trainer.sft.stage import tokenize_rows
from trainer.sft.tokenizing import SftTokenizer

MEASURED_ROWS = 2_000
"""Rows of a split whose prompts are rendered to measure their length."""


def check_command(config: Path, overrides: list[str], *, conversations: int, offline: bool = False) -> int:
    """Run `agentloop check`; return the exit code.

    Args:
        conversations: number of probe conversations for the chat template.
        offline: without the weights, and without what only the hub has.

    Raises:
        UserError: a problem that would stop a run, with its fix.
    """
    file = find_config(config)
    if "stages" in read_config(file):
        return _check_sft(load_config(SftRecipe, file, overrides), offline=offline)
    recipe = load_config(Recipe, file, overrides)
    with Console() as console:
        check_loggers(recipe.loggers)
        load_destinations(recipe.trace, ExportRun.of(recipe, recipe.run_dir))
        if offline and _only_on_hub(recipe.model.path):
            _check_without_model(recipe, console)
            return 0
        inputs = prepare(recipe, console, conversations=conversations, compare_tensors=not offline, weights=not offline)
        for line in summary(inputs.proof, inputs.renderer):
            console.notice(line.plain)
        for split, tasks in (("train", inputs.train), ("val", inputs.val)):
            if tasks:
                console.notice(f"{split:12} {_rows(inputs, tasks)}")
        _show_code(recipe, console, inputs.agents, inputs.toolset, inputs.interactions, offline=offline)
        console.notice(f"{'steps':12} {inputs.total_steps}")
        sources = step_reward_sources(inputs.agents.values(), inputs.toolset.tools, inputs.interactions.named)
        if sources and ignores_step_rewards(recipe):
            console.warn(step_reward_text(recipe, sources))
        console.notice(
            "no problem found; the weights were not checked" if offline else "no problem found: a run would start"
        )
    return 0


def _only_on_hub(model: str) -> bool:
    """Whether a model is that of a hub, and its files were not downloaded before."""
    if not may_be_hub_id(model) or Path(model).exists():
        return False
    try:
        return not ModelFolder.resolve(model).has_config
    except ModelError:
        return True


def _check_without_model(recipe: Recipe, console: Console) -> None:
    """Check what needs neither the tokenizer nor the template of the model.

    Raises:
        UserError: a problem that would stop a run, with its fix.
    """
    with console.phase("load agents, tools and reward"):
        code = RunCode.load(recipe)
    agents: set[str] = set()
    for split, source in (("train", recipe.data.train), ("val", recipe.data.val)):
        if source is None:
            continue
        checks = RowChecks(code, f"data.{split}", sent=recipe.cluster.agents.workers > 0)
        with console.phase(f"load and check {split} rows"):
            tasks = load_split(recipe, split, source)
            for index, (task, _) in enumerate(tasks.walk()):
                checks.check(task, f"data.{split}: {tasks.where(index)}")
                agents.add(task.agent_name)
            checks.require_truth(recipe)
        for warning in checks.warnings():
            console.warn(warning)
        console.notice(f"{split:12} {counted(len(tasks), 'row')}")
    _show_code(recipe, console, sorted(agents), code.toolset, code.interactions, offline=True)
    console.warn(
        f"model.path {recipe.model.path} is not on this machine: tokenizer, chat template, images and the length of "
        "the prompts were not checked"
    )
    console.notice("no problem found; the model was not checked")


def _show_code(
    recipe: Recipe,
    console: Console,
    agents: Iterable[str],
    toolset: Toolset,
    interactions: Interactions,
    *,
    offline: bool,
) -> None:
    console.notice(f"{'agents':12} {', '.join(agents)}")
    console.notice(f"{'tools':12} {', '.join(toolset.tools) or 'none'}")
    reward = recipe.reward.function if recipe.reward is not None else "the sum of the step rewards"
    console.notice(f"{'reward':12} {reward}")
    console.notice(f"{'interactions':12} {', '.join(sorted(interactions.named)) or 'none'}")
    for warning in [] if offline else unreachable(toolset.tools.values()):
        console.warn(warning)


def _check_sft(recipe: SftRecipe, *, offline: bool) -> int:
    """Check a recipe of `agentloop sft`: model, tokenizer, template, and every row."""
    with Console() as console:
        check_loggers(recipe.loggers)
        if recipe.out is not None:
            check_target(recipe.out, replace=True, source=recipe.model.path, key="out")
        if offline and _only_on_hub(recipe.model.path):
            console.warn(f"model.path {recipe.model.path} is not on this machine: only the recipe's keys were checked")
            console.notice("no problem found; the model and the rows were not checked")
            return 0
        trust, weights = recipe.model.trust_remote_code, recipe.model.init == "weights" and not offline
        with console.phase("check model files"):
            folder = find_model(recipe.model.path, console.warn, trust_remote_code=trust, weights=weights)
        with console.phase("load tokenizer and template"):
            model = recipe.model.model_copy(update={"path": str(folder.path)})
            tokenizer = SftTokenizer.load(model, recipe.max_tokens, overlong=recipe.overlong)
        sources: list[tuple[str, str, str | list[str], int | None]]
        sources = [(stage.name, f"stages[{n}].data", stage.data, None) for n, stage in enumerate(recipe.stages)]
        if recipe.eval_data is not None:
            sources.append(("eval_data", "eval_data", recipe.eval_data, recipe.eval_max_rows))
        for name, key, source, most in sources:
            try:
                with console.phase(f"tokenize the rows of {name}"):
                    rows = tokenize_rows(source, key, tokenizer, max_rows=most)
            except DataError as exc:
                if recipe.prepare is None or "does not exist" not in exc.message:
                    raise
                console.notice(f"{name:12} not written yet: a run calls {recipe.prepare} first; check again after that")
                continue
            console.notice(f"{name:12} {rows.described}")
        if weights:  # last, because it takes longest
            with console.phase("compare the model's tensors with its architecture"):
                check_tensors(folder, trust_remote_code=trust)
        console.notice(
            "no problem found; the weights were not checked" if offline else "no problem found: a run would start"
        )
    return 0


def _rows(inputs: RunInputs, tasks: Sequence[Task]) -> str:
    """Return the number of rows, and the lengths of the prompts that can be measured."""
    lengths: list[int] = []
    for task in tasks[:MEASURED_ROWS]:
        with contextlib.suppress(ImageError):  # reported before: such a row's episodes fail alone
            lengths.append(len(inputs.renderer.start(task.prompt, inputs.toolset.schemas or None)))
    if not lengths:
        return counted(len(tasks), "row")
    return (
        f"{counted(len(tasks), 'row')}; tokens of the first prompt with tool schemas: "
        f"mean {statistics.fmean(lengths):.0f}, longest {max(lengths)} of {inputs.recipe.data.max_prompt_tokens}"
    )
