"""`agentloop cluster`: look at a run that is going on, and change its number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from agentloop.commands.runs import check_is_run
from agentloop.errors import ConfigError
from agentloop.text import clean, did_you_mean
from trainer.run.control import ask

PARTS = ("rollout", "agents")
"""What `scale` changes: replicas of the rollout server, agent workers."""


def status_command(run: Path) -> None:
    """Run `agentloop cluster status`.

    Raises:
        AgentloopError: no run is going on there, or it does not answer.
    """
    check_is_run(run)
    found = ask(run, "status")
    console = Console(highlight=False)
    place = f"step {found['step']} of {found['steps']}, version {found['version']}, process {found['pid']}"
    console.print(f"{clean(run, 300)}: {place}", markup=False)
    table = Table(box=None, pad_edge=False)
    for column in ("part", "state", "version", "in flight", "process"):
        table.add_column(column)
    for row in found["processes"]:
        table.add_row(*(str(row.get(key, "")) for key in ("part", "state", "version", "in_flight", "pid")))
    console.print(table)


def scale_command(run: Path, words: Sequence[str]) -> None:
    """Run `agentloop cluster scale`.

    Args:
        words: `rollout=6`, `agents=4`.

    Raises:
        ConfigError: a word is wrong; nothing was changed.
        AgentloopError: no run is going on there, or it cannot.
    """
    check_is_run(run)
    wanted = _wanted(words)
    for line in ask(run, "scale", **wanted):
        print(line)


def _wanted(words: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for word in words:
        part, equals, number = word.partition("=")
        if part not in PARTS:
            fix = did_you_mean(part, PARTS, "write rollout=6 or agents=4")
            raise ConfigError(f"{clean(word, 100)!r} names no part of a run", fix)
        if not equals or not number.isascii() or not number.isdigit() or not 1 <= int(number) <= 1024:
            raise ConfigError(f"{clean(word, 100)!r} has no number of 1 to 1024", f"write {part}=4")
        found[part] = int(number)
    return found
