"""Tables of `step.py`, and the file that keeps them."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

from quiet import QUIET_CORES

TARGETS = {"equal": 0.8, "longtail": 0.5, "tool": 0.5, "tool-short": 0.5}
STAGES = {
    "rollout/time_s": "rollout",
    "train/time_s": "training",
    "train/wait_s": "training waits",
    "rollout/wait_s": "rollout waits",
    "publish/time_s": "publishing",
}
NOT_COMPARABLE = "NOT COMPARABLE:"
HEADING = """# Results

Written by the commands named in each section with `--record`. Seconds depend on the machine and on what else it does;
the ratios are of runs in turn on the same cores.
"""


def describe(result: dict[str, Any]) -> str:
    """The section of one scenario."""
    steps = all_steps(result["ours"])
    wall, sampled = _median(steps, "wall_s"), _median(steps, "rollout/tokens")
    tools = _median(steps, "episode/tool_calls_mean")
    rows = [
        [
            "agentloop",
            f"{wall:.2f}",
            f"{_median(steps, 'rollout/tokens_per_s'):,.0f}",
            f"{sampled / _median(steps, 'train/time_s'):,.0f}",
            f"{_median(steps, 'rollout/time_s'):.2f} / {_median(steps, 'train/time_s'):.2f}",
            f"{sampled:,.0f}",
            f"{tools:.2f}",
        ]
    ]
    for peer in result["trl"]:
        theirs = all_steps(peer["rounds"])
        rows.append(
            [
                f"TRL, {peer['threads']} thread{'s' * (peer['threads'] > 1)}, micro-batch {peer['micro']}",
                f"{_median(theirs, 'step_s'):.2f}",
                f"{_median(theirs, 'sampled_tokens') / _median(theirs, 'generation_s'):,.0f}",
                f"{_median(theirs, 'sampled_tokens') / _median(theirs, 'train_s'):,.0f}",
                f"{_median(theirs, 'generation_s'):.2f} / {_median(theirs, 'train_s'):.2f}",
                f"{_median(theirs, 'sampled_tokens'):,.0f}",
                f"{_median(theirs, 'tool_episodes') / 256:.2f}",
            ]
        )
    names = ["", "s a step", "rollout tok/s", "training tok/s", "s rollout / training", "sampled tokens", "tool calls"]
    lines = [f"### {result['scenario']}", "", *table([names, *rows]), ""]
    lines += result["notes"]
    if result["trl"]:
        lines.append(_verdict(result))
    stages = [f"{name} {_share(steps, key, wall)}" for key, name in STAGES.items()]
    outside = wall - _median(steps, "step/time_s")
    lines.append(
        f"Ours, share of a step (rollout and training overlap): {', '.join(stages)}; between steps "
        f"{outside:.3f} s. Packed tokens trained: {_median(steps, 'train/tokens'):,.0f} a step, "
        f"{_median(steps, 'train/tokens_per_s'):,.0f}/s."
    )
    if result["tried"]:
        tried = ", ".join(f"{one['threads']}x{one['micro']} {one['step_s']:.2f}" for one in result["tried"])
        lines.append(f"TRL's settings tried (threads x micro-batch, seconds): {tried}.")
    return "\n".join([*lines, "", f"    {result['command']}", ""])


def _verdict(result: dict[str, Any]) -> str:
    """The ratio to TRL's fastest setting; whether it meets the target only where that can be said."""
    best, own = result["trl"][0]["rounds"], result["ours"]
    target = TARGETS[result["scenario"]]
    ratio = _median(all_steps(own), "wall_s") / _median(all_steps(best), "step_s")
    pairs = zip(own, best, strict=True)
    by_round = [_median(one["steps"], "wall_s") / _median(other["steps"], "step_s") for one, other in pairs]
    loads = [one["other_cores"] for one in [*own, *best] if one["other_cores"] is not None]
    verdict = "met" if ratio <= target else "MISSED"
    if max(loads, default=0.0) > QUIET_CORES:
        verdict = f"NO VERDICT: other processes took up to {max(loads):.2f} cores"
    elif any(note.startswith(NOT_COMPARABLE) for note in result["notes"]):
        verdict = "NO VERDICT"
    spread = ", ".join(f"{one:.2f}" for one in by_round)
    return f"**Ours / TRL at its fastest: {ratio:.2f}** (to reach: {target}; {verdict}; by round {spread})."


def all_steps(rounds: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps of all rounds: medians are taken over them."""
    return [step for one in rounds for step in one["steps"]]


def _median(steps: list[dict[str, Any]], key: str) -> float:
    return statistics.median(step[key] for step in steps)


def _share(steps: list[dict[str, Any]], key: str, wall: float) -> str:
    seconds = _median(steps, key)
    return f"{seconds:.2f} s ({seconds / wall:.0%})"


def table(rows: list[list[str]]) -> list[str]:
    """Markdown that is aligned in a terminal too."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 1) + ("-" if i == 0 else ":") for i, width in enumerate(widths)) + "|"
    return [lines[0], rule, *lines[1:]]


def hardware() -> str:
    """Processor, cores that may be used, load: what seconds depend on."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []  # fmt: skip
    cores = len(os.sched_getaffinity(0))
    return (
        f"{names[0] if names else platform.machine()}, {cores} core{'s' * (cores > 1)}, "
        f"Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}"
    )


def record(path: Path, command: str, tables: list[str], script: str = "step.py", machine: str = "") -> None:
    """Add a section to the file, the newest first. `machine` is what `hardware` said when the run began."""
    text = path.read_text(encoding="utf-8") if path.exists() else HEADING
    heading, _, older = text.partition("\n## ")
    section = "\n".join(
        [f"## {script}, {date.today()}", "", f"{machine or hardware()}, CPU, fp32.", "", f"    {command}", "", *tables]
    )
    path.write_text(heading.rstrip() + "\n\n" + section + (f"\n## {older}" if older else ""), encoding="utf-8")
