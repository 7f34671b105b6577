"""`agentloop trace list`: the episodes of a run, one a line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

SORTS = {
    "step": "step",
    "reward": "reward",
    "turns": "turn_count",
    "calls": "tool_calls",
    "length": "length",
    "sampled": "sampled",
    "task": "task_id",
    "status": "status",
}
"""Name of an order -> column."""


def list_episodes(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, e.g. outputs/quickstart")],
    step: Annotated[str | None, typer.Option(help="a step, or several: 3-9")] = None,
    split: Annotated[Literal["train", "eval", "all"], typer.Option(help="train, eval or all")] = "all",
    status: Annotated[Literal["ok", "failed", "rejected"] | None, typer.Option(help="ok, failed or rejected")] = None,
    min_reward: Annotated[float | None, typer.Option(help="least reward")] = None,
    max_reward: Annotated[float | None, typer.Option(help="largest reward")] = None,
    task: Annotated[str | None, typer.Option(help="episodes of this task_id")] = None,
    search: Annotated[str | None, typer.Option(help="text in messages, answers or errors; case is ignored")] = None,
    sort: Annotated[str, typer.Option(help=f"one of {', '.join(SORTS)}; a leading - sorts downward")] = "-step",
    limit: Annotated[int, typer.Option(min=0, help="most episodes that are shown; 0: all")] = 50,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """List the episodes of a run: key, reward, turns, calls, how they ended.

    Example:

      agentloop trace list outputs/quickstart --step 60 --sort -reward --limit 5
    """
    import pyarrow as pa

    from agentloop.commands.trace.printing import Printer, print_json
    from agentloop.commands.trace.reading import Reading, say_problems
    from agentloop.trace.export import Selection

    column, order = _order(sort)
    reading = Reading(run, step, split)
    table = reading.select(Selection(status, min_reward, max_reward, task, search))
    total = len(table)
    # Ties stay in the order of the store.
    table = table.append_column("_at", pa.array(range(total), pa.int64()))
    table = table.sort_by([(column, order), ("_at", "ascending")])
    rows = [_row(row) for row in table.slice(0, limit or total).to_pylist()]
    texts = reading.last_texts([row["key"] for row in rows if _is_blank(row["answer"]) and row["error"] is None])
    rows = [row | {"text": texts.get(row["key"])} for row in rows]
    problems = reading.problems()
    if json:
        print_json({"total": total, "rows": rows, "problems": problems})
        return

    printer = Printer()
    titles = ("key", "reward", "turns", "calls", "tokens", "stale", "status", "stop", "task", "answer or last words")
    printer.table(titles, [_cells(row) for row in rows], right=("reward", "turns", "calls", "tokens", "stale"))
    if total > len(rows):
        printer.line((f"{len(rows):,} of {total:,} episodes; --limit 0 shows all", "dim"))
    elif not total:
        printer.line("no episode that can be read matches" if reading.is_unread else "no episode matches")
    say_problems(problems)


def _order(sort: str) -> tuple[str, str]:
    """Return column and direction of `--sort`.

    Raises:
        TraceError: the sort column is unknown.
    """
    from agentloop.errors import TraceError
    from agentloop.text import did_you_mean

    name = sort.removeprefix("-")
    if name not in SORTS:
        raise TraceError(f"--sort {sort!r} is not an order", did_you_mean(name, SORTS, f"choose {', '.join(SORTS)}"))
    return SORTS[name], "descending" if sort.startswith("-") else "ascending"


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """Return an episode as `--json` shows it."""
    from agentloop.text import finite
    from agentloop.trace.export.selection import key_of

    oldest = row["min_version"]
    return {
        "key": key_of(row),
        "step": row["step"],
        "split": row["split"],
        "group_id": row["group_id"],
        "sample_index": row["sample_index"],
        "task_id": row["task_id"],
        "agent_name": row["agent_name"],
        "status": row["status"],
        "stop_reason": row["stop_reason"],
        "reward": finite(row["reward"]),
        "parts": {name: finite(value) for name, value in row["reward_parts"] or ()},
        "turns": row["turn_count"],
        "tool_calls": row["tool_calls"],
        "length": row["length"],
        "response_tokens": row["length"] - row["prompt_length"],
        "sampled": row["sampled"],
        "staleness": None if oldest is None else row["version"] - oldest,
        "trajectories": row["parts"],
        "answer": row["answer"],
        "error": row["error"],
    }


def _is_blank(answer: str | None) -> bool:
    """Whether a reward found no answer; what the model wrote last then says more."""
    return answer is None or not answer.strip()


def _cells(row: dict[str, Any]) -> list[str]:
    from agentloop.text import number

    text = row["error"] or (row["text"] if _is_blank(row["answer"]) else row["answer"]) or ""
    return [
        row["key"],
        number(row["reward"]),
        str(row["turns"]),
        str(row["tool_calls"]),
        str(row["response_tokens"]),
        "–" if row["staleness"] is None else str(row["staleness"]),
        row["status"],
        row["stop_reason"],
        row["task_id"],
        text,
    ]
