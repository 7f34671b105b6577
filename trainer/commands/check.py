"""`agentloop check`: the checks before a run starts, and the proof of its chat template."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from agentloop.commands.recipes import find_config
from agentloop.commands.template_report import summary
from agentloop.config import Recipe
from agentloop.config.loading import load_config
from agentloop.types import Task
from trainer.console.console import Console
from trainer.run.preflight import RunInputs, prepare

MEASURED_ROWS = 2_000
"""Rows of a split whose prompts are rendered to measure their length."""


def check_command(config: Path, overrides: list[str], *, conversations: int) -> int:
    """Run `agentloop check`; return the exit code.

    Raises:
        UserError: a problem that would stop a run, with its fix.
    """
    recipe = load_config(Recipe, find_config(config), overrides)
    with Console() as console:
        inputs = prepare(recipe, console, conversations=conversations)
        for line in summary(inputs.proof, inputs.renderer):
            console.notice(line.plain)
        for split, tasks in (("train", inputs.train), ("val", inputs.val)):
            if tasks:
                console.notice(f"{split:12} {_rows(inputs, tasks)}")
        console.notice(f"{'agents':12} {', '.join(inputs.agents)}")
        console.notice(f"{'tools':12} {', '.join(inputs.toolset.tools) or 'none'}")
        reward = recipe.reward.function if recipe.reward is not None else "the sum of the step rewards"
        console.notice(f"{'reward':12} {reward}")
        console.notice(f"{'interactions':12} {', '.join(sorted(inputs.interactions.named)) or 'none'}")
        console.notice(f"{'steps':12} {inputs.total_steps}")
        console.notice("no problem found: a run would start")
    return 0


def _rows(inputs: RunInputs, tasks: Sequence[Task]) -> str:
    measured = tasks[:MEASURED_ROWS]
    schemas = inputs.toolset.schemas or None
    lengths = [len(inputs.renderer.start(task.prompt, schemas)) for task in measured]
    return (
        f"{len(tasks)} rows; tokens of the first prompt with tool schemas: mean {statistics.fmean(lengths):.0f}, "
        f"longest {max(lengths)} of {inputs.recipe.data.max_prompt_tokens}"
    )
