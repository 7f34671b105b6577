"""Lines of text for steps and evaluations: columns that fit, cells. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.text import Text

from agentloop.text import finite, number, seconds

Metrics = Mapping[str, Any]

LEAST_IDLE = 0.05
"""Share of a step: a side that idles less than this is not said to be idle."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the step lines. A narrow terminal drops the columns with the largest `keep`."""

    title: str
    width: int
    style: str
    keep: int


COLUMNS = (
    Column("step", 5, "bold", 0),
    Column("reward", 11, "bold green", 0),
    Column("tools", 5, "", 2),
    Column("tokens", 6, "", 3),
    Column("roll/s", 6, "cyan", 4),
    Column("train/s", 7, "cyan", 4),
    Column("mismatch", 8, "", 1),
    Column("stale", 5, "", 5),
    Column("time", 6, "", 1),
    Column("bound by", 10, "dim", 6),
)
"""tools: calls per episode; tokens: response tokens per episode; roll/s, train/s: tokens per
second; bound by: what was slow, and how long the other side was idle meanwhile."""

IDLE_WIDTH = 24
"""Further columns of `bound by` with the share of the step that the other side was idle."""


def fit_columns(total_steps: int, width: int | None) -> tuple[list[Column], str]:
    """Choose the columns that fit.

    Args:
        width: columns of the terminal; None: no limit.

    Returns:
        The columns, and the gap between them.
    """
    step_width = max(5, 2 * len(str(total_steps)) + 1)
    columns = [replace(column, width=step_width) if column.title == "step" else column for column in COLUMNS]
    if width is None:
        return columns, "  "

    while len(columns) > 2 and _width(columns, 1) > width:
        columns.remove(max(columns, key=lambda column: column.keep))
    return columns, "  " if _width(columns, 2) <= width else " "


def header_line(columns: Sequence[Column], gap: str) -> Text:
    return Text(gap.join(_fit(column.title, column) for column in columns).rstrip(), style="dim")


def step_line(metrics: Metrics, total_steps: int, columns: Sequence[Column], gap: str, width: int | None) -> Text:
    """The line of a finished step. Keys are those of docs/metrics.md; any may be missing."""
    cells = _cells(metrics, total_steps, idle=width is None or width >= _width(COLUMNS, 2) + IDLE_WIDTH)
    line = Text()
    for index, column in enumerate(columns):
        line.append(gap if index else "")
        line.append(_fit(cells[column.title], column), style=column.style)
    line.rstrip()
    return line


def eval_line(metrics: Metrics, first_reward: float | None) -> Text:
    """The line of an evaluation.

    Args:
        first_reward: of the first evaluation, for comparison; None for the first itself.
    """
    line = Text.assemble(("eval", "bold magenta"), f"  step {int(finite(metrics.get('step')) or 0)}  reward ")
    line.append(number(finite(metrics.get("eval/reward_mean"))), style="bold magenta")
    if first_reward is not None:
        line.append(f" (first {number(first_reward)})")

    facts = ""
    for key, value in metrics.items():
        # pass@k and maj@k of all rows. Keys with two slashes are per data source: too many.
        if "@" in key and key.count("/") == 1 and not key.endswith("@1"):
            facts += f"  {key.removeprefix('eval/')} {number(finite(value))}"
    for key, label in (
        ("tool_calls_mean", "tools"), ("tool_errors_mean", "tool errors"), ("episodes", "episodes"),
        ("failed", "failed"),
    ):  # fmt: skip
        value = finite(metrics.get(f"eval/{key}"))
        if value is not None and (value or key not in ("failed", "tool_errors_mean")):
            facts += f"  {number(value)} {label}"
    if (took := finite(metrics.get("eval/time_s"))) is not None:
        facts += f"  {seconds(took)}"

    line.append(facts, style="dim")
    return line


def _cells(metrics: Metrics, total_steps: int, *, idle: bool) -> dict[str, str]:
    def get(key: str) -> float | None:
        return finite(metrics.get(key))

    reward, std = get("reward/mean"), get("reward/std")
    return {
        "step": f"{int(get('step') or 0)}/{total_steps}",
        "reward": _two_decimals(reward) + (f" ± {_two_decimals(std)}" if std is not None else ""),
        "tools": _two_decimals(get("episode/tool_calls_mean")),
        "tokens": number(get("episode/response_tokens_mean")),
        "roll/s": number(get("rollout/tokens_per_s")),
        "train/s": number(get("train/tokens_per_s")),
        "mismatch": number(get("mismatch/logprob_abs_mean")),
        "stale": number(get("staleness/max")),
        "time": seconds(get("step/time_s")),
        "bound by": bound_by(metrics, idle=idle),
    }


def _fit(text: str, column: Column) -> str:
    return f"{text:<{column.width}}" if column is COLUMNS[-1] else f"{text:>{column.width}}"


def _width(columns: Sequence[Column], gap: int) -> int:
    return sum(column.width for column in columns) + gap * (len(columns) - 1)


def _two_decimals(value: float | None) -> str:
    """Two decimals in the usual range of rewards; fewer for larger values."""
    return f"{value:.2f}" if value is not None and abs(value) < 10 else number(value)


def bound_by(metrics: Metrics, *, idle: bool = True) -> str:
    """Return what a step was bound by: `training (rollout idle 87%)`; `–` if it is not known.

    Args:
        idle: also name the side that waited, and for which share of the step.
    """
    whole, train, rollout = (finite(metrics.get(key)) for key in ("step/time_s", "train/wait_s", "rollout/wait_s"))
    if not whole or train is None or rollout is None:
        return "–"

    # Each side waits for the other: the one that waits less is the slow one.
    wait, waited = max((train, "training"), (rollout, "rollout"))
    share = min(1.0, wait / whole)
    if share < LEAST_IDLE:
        return "both"
    slow = "rollout"
    if waited == "rollout":
        training, publishing = (finite(metrics.get(key)) or 0.0 for key in ("train/time_s", "publish/time_s"))
        slow = "training" if training >= publishing else "publishing"
    return f"{slow} ({waited} idle {share:.0%})" if idle else slow
