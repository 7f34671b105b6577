"""`agentloop trace rescore`: rewards again, from stored episodes, without generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal

import typer

if TYPE_CHECKING:
    from agentloop.config import RewardConfig
    from agentloop.reward.rescoring import Rescored, TaskFinder

BIGGEST, SHOWN_ERRORS = 10, 5
"""Episodes with the largest changes, and different errors, that are shown."""


def rescore(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, e.g. outputs/quickstart")],
    reward: Annotated[
        str | None, typer.Option(help="path.py:function, or a registered name; default: the run's own")
    ] = None,
    step: Annotated[str | None, typer.Option(help="a step, or several: 3-9")] = None,
    split: Annotated[Literal["train", "eval"], typer.Option(help="train or eval")] = "train",
    limit: Annotated[int, typer.Option(min=0, help="most episodes, the first ones; 0: all")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON lines to write, one an episode")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace the file if it exists")] = False,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Score the episodes of a run again, without generation, and show old beside new rewards.

    The rows are read where the run's recipe has them; each episode finds its own by task_id.

      agentloop trace rescore outputs/quickstart --reward my_reward.py:score --step 60
    """
    import asyncio

    from agentloop.commands.trace.output import LINES, check_out
    from agentloop.commands.trace.printing import print_json, progress
    from agentloop.commands.trace.reading import Reading, say_problems
    from agentloop.commands.trace.settings import read_config, setting
    from agentloop.files import json_line, open_atomic
    from agentloop.reward.loading import close_reward, load_reward
    from agentloop.trace.export import Selection
    from agentloop.trace.export.selection import key_of

    if out is not None:
        check_out(out, LINES, "rescore", force=force)
    reading = Reading(run, step, split)
    config = read_config(run)
    chosen = _reward_config(config, reward)
    table = reading.select(Selection())
    keys = [key_of(row) for row in table.slice(0, limit or len(table)).to_pylist()]
    function = load_reward(chosen)
    assert function is not None  # `chosen` names one
    finder = _finder(config, split)
    timeout_s = float(setting(config, "reward_timeout_s") or 60.0)

    done: list[Rescored] = []
    skipped = 0

    async def score(advance: Callable[[], None], file: BinaryIO | None) -> int:
        from agentloop.reward.rescoring import can_be_scored, rescore

        left_out = 0

        def records() -> Any:
            nonlocal left_out
            for episode in reading.episodes(keys):
                if can_be_scored(episode[-1]):
                    yield episode[-1]
                else:
                    left_out += 1

        async for result in rescore(records(), finder, function, timeout_s):
            done.append(result)
            advance()
            if file is not None:
                file.write(json_line({**asdict(result), "changed": result.changed}))
        return left_out

    try:
        with ExitStack() as stack:
            file = stack.enter_context(open_atomic(out)) if out is not None else None
            advance = stack.enter_context(progress(len(keys), "episodes"))
            skipped = asyncio.run(score(advance, file))
            if not any(result.error is None for result in done):
                raise _none_scored(done, skipped)
    finally:
        close_reward(function)

    found = _summary(done, skipped)
    if json:
        print_json(found | {"reward": chosen.function, "problems": reading.problems()})
        return
    _show(found, chosen.function)
    say_problems(reading.problems())


def _reward_config(config: dict[str, Any], given: str | None) -> RewardConfig:
    """Return the reward to call: the run's own, or another one that runs in the same way.

    Raises:
        TraceError: neither is there.
    """
    from agentloop.config import RewardConfig
    from agentloop.errors import TraceError

    own = config.get("reward")
    settings = dict(own) if isinstance(own, dict) else {"function": own} if own else {}
    if given is not None:
        settings["function"] = given
    if not settings.get("function"):
        raise TraceError(
            "the run has no reward function: its rewards are sums of step rewards",
            "name one with --reward path.py:function",
        )
    return RewardConfig.model_validate(settings)


def _finder(config: dict[str, Any], split: str) -> TaskFinder:
    """Open the rows of the run's recipe.

    Raises:
        TraceError: the recipe names none, or is missing.
        DataError: they cannot be read.
    """
    from agentloop.commands.trace.settings import setting
    from agentloop.data import load_tasks
    from agentloop.errors import TraceError
    from agentloop.reward.rescoring import TaskFinder

    key = "data.val" if split == "eval" else "data.train"
    source = setting(config, key)
    if not source:
        raise TraceError(
            f"the run's config/resolved.json names no {key}, so the rows of its episodes are unknown",
            "restore the file, or give a run that has it",
        )
    default = str(setting(config, "data.default_agent") or "")
    return TaskFinder(load_tasks(source, key, default, setting(config, "data.options") or {}))


def _none_scored(done: Sequence[Rescored], skipped: int) -> Exception:
    from agentloop.errors import RewardError

    if not done:
        return RewardError(f"no episode can be scored: {skipped:,} failed before their reward", "choose other steps")
    return RewardError(f"none of {len(done):,} episodes could be scored: {done[0].error}", "see the first error")


def _summary(done: Sequence[Rescored], skipped: int) -> dict[str, Any]:
    """Return what `--json` prints."""
    from collections import Counter

    from agentloop.text import mean

    scored = [result for result in done if result.new is not None]
    compared = [result for result in scored if result.old is not None]
    changed = [result for result in compared if result.changed]
    names = sorted({name for result in scored for name in result.new_parts})
    biggest = sorted(changed, key=lambda result: (-abs(result.difference), result.key))[:BIGGEST]
    errors = Counter(result.error for result in done if result.error is not None)
    return {
        "episodes": len(done),
        "compared": len(compared),
        "old_mean": mean(result.old for result in compared),
        "new_mean": mean(result.new for result in compared),
        "changed": len(changed),
        "higher": sum(result.difference > 0 for result in changed),
        "lower": sum(result.difference < 0 for result in changed),
        "answers_changed": sum(result.old_answer != result.new_answer for result in compared),
        "scored_anew": len(scored) - len(compared),
        "left_out": skipped,
        "rows_moved": sum(result.moved for result in done),
        "parts": {
            name: {
                "old": mean(result.old_parts.get(name) for result in scored),
                "new": mean(result.new_parts.get(name) for result in scored),
                "changed": sum(result.old_parts.get(name) != result.new_parts.get(name) for result in scored),
            }
            for name in names
        },
        "biggest": [asdict(result) for result in biggest],
        "errors": [{"error": error, "episodes": count} for error, count in errors.most_common(SHOWN_ERRORS)],
        "failed": sum(errors.values()),
    }


def _show(found: dict[str, Any], function: str) -> None:
    from agentloop.commands.trace.printing import Printer
    from agentloop.text import clean, number

    printer = Printer()
    printer.line((f"reward {clean(function, 200)}", "bold"))
    rows = [["reward", number(found["old_mean"]), number(found["new_mean"]), f"{found['changed']:,}"]]
    for name, part in found["parts"].items():
        rows.append([f"part {name}", number(part["old"]), number(part["new"]), f"{part['changed']:,}"])
    printer.table(("mean of", "old", "new", "changed"), rows, right=("old", "new", "changed"))
    if found["changed"]:
        printer.line(
            f"changed: {found['changed']:,} of {found['compared']:,} rewards, {found['higher']:,} higher and "
            f"{found['lower']:,} lower"
        )
    elif not found["failed"]:
        printer.line(f"every reward is the stored one, to the bit ({found['compared']:,})")
    if found["scored_anew"]:
        printer.line(f"scored anew, after a reward that failed: {found['scored_anew']:,}")
    if found["left_out"]:
        printer.line(f"left out, because they failed before their reward: {found['left_out']:,}")
    if found["rows_moved"]:
        printer.line(
            (
                f"conversations that do not begin with their row's prompt (the rows changed): {found['rows_moved']:,}",
                "yellow",
            )
        )
    for error in found["errors"]:
        printer.line((f"could not be scored: {error['episodes']:,}: {clean(error['error'], 400)}", "red"))
    if found["failed"] and not found["changed"]:
        equal = (
            f"the other {found['compared']:,} rewards are the stored ones" if found["compared"] else "no other reward"
        )
        printer.line((f"{found['failed']:,} episodes could not be scored; {equal}", "red"))
    if found["biggest"]:
        printer.line()
        printer.table(
            ("key", "old", "new", "task", "answer"),
            [
                [each["key"], number(each["old"]), number(each["new"]), each["task_id"], each["new_answer"] or ""]
                for each in found["biggest"]
            ],
            right=("old", "new"),
        )
