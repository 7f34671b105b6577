"""Draw the reward curves of runs as one SVG file, and check how far they rose.

    python -m recipes.curve outputs/RUN [outputs/RUN ...] --out curve.svg
    python -m recipes.curve outputs/RUN --starts-below 0.35 --ends-above 0.8

Each run is a line of `reward/mean` over its steps, from its `metrics.jsonl`, with its evaluations
as diamonds. The first step and the mean of the last five are printed. With bounds, the exit code is
1 if a run misses one.
"""

from __future__ import annotations

import argparse
import html
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from agentloop.files import write_atomic
from agentloop.report.plots import HEIGHT, WIDTH, Plot, Series

LAST_STEPS = 5
"""The end of a curve is the mean of this many steps: one step of sampled episodes is noisy."""

COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#475569")
LEFT, TOP, RIGHT, BOTTOM = 60, 50, 20, 50
"""Margins around the plot, for its ticks and its legend."""


@dataclass(frozen=True)
class Curve:
    """The rewards of one run by step; None where a step has none."""

    name: str
    steps: list[int]
    rewards: list[float | None]
    evaluations: list[float | None]

    @property
    def first(self) -> float:
        return next(reward for reward in self.rewards if reward is not None)

    @property
    def last(self) -> float:
        return statistics.fmean([reward for reward in self.rewards if reward is not None][-LAST_STEPS:])


def read_curve(run: Path, name: str | None = None) -> Curve:
    """Read a run's folder.

    Raises:
        OSError: there is no `metrics.jsonl`.
        ValueError: no step has a reward.
    """
    lines = [orjson.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines() if line.strip()]
    by_step: dict[int, dict[str, float | None]] = {}
    for line in lines:
        by_step.setdefault(line["step"], {}).update(line)
    steps = sorted(by_step)
    rewards = [by_step[step].get("reward/mean") for step in steps]
    if all(reward is None for reward in rewards):
        raise ValueError(f"{run}/metrics.jsonl: no step has a reward/mean")
    return Curve(name or run.name, steps, rewards, [by_step[step].get("eval/reward_mean") for step in steps])


def draw(curves: Sequence[Curve], title: str) -> str:
    """Return an SVG of all curves over the steps that they have in common axes."""
    steps = sorted({step for curve in curves for step in curve.steps})
    series = []
    for colour, curve in enumerate(curves):
        rewards = dict(zip(curve.steps, curve.rewards, strict=True))
        evaluations = dict(zip(curve.steps, curve.evaluations, strict=True))
        series.append(Series(curve.name, [rewards.get(step) for step in steps], colour))
        series.append(Series(f"{curve.name}, evaluated", [evaluations.get(step) for step in steps], colour, mark=True))
    low = min(0.0, *(reward for curve in curves for reward in curve.rewards if reward is not None))
    drawn = Plot(title, "", steps, series, low=low, high=1.0).draw()

    width, height = WIDTH + LEFT + RIGHT, HEIGHT + TOP + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" font-family="sans-serif">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="16" fill="#111">{html.escape(title)}</text>',
    ]
    for tick in drawn["y_ticks"]:
        y = TOP + HEIGHT * _share(tick["top"])
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + WIDTH:.0f}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" {_TICK} text-anchor="end">{tick["label"]}</text>')
    for tick in drawn["x_ticks"]:
        x = LEFT + WIDTH * _share(tick["left"])
        parts.append(
            f'<text x="{x:.1f}" y="{TOP + HEIGHT + 20:.0f}" {_TICK} text-anchor="middle">{tick["label"]}</text>'
        )
    parts.append(f'<text x="{LEFT + WIDTH / 2:.0f}" y="{height - 8:.0f}" {_TICK} text-anchor="middle">step</text>')

    parts.append(f'<g transform="translate({LEFT} {TOP})" fill="none" stroke-width="2">')
    for shape in drawn["shapes"]:
        thin = ' stroke-dasharray="4 4" stroke-width="1"' if "dashed" in shape["class"] else ""
        parts.append(f'<path d="{shape["d"]}" stroke="{_colour(shape["class"])}"{thin}/>')
    for mark in drawn["marks"]:
        x, y = WIDTH * _share(mark["left"]), HEIGHT * _share(mark["top"])
        parts.append(f'<path d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z" fill="{_colour(mark["class"])}"/>')
    parts.append("</g>")
    for number, curve in enumerate(curves):
        x = LEFT + number * WIDTH / max(3, len(curves))
        text = f"{html.escape(curve.name)}: {curve.first:.2f} to {curve.last:.2f}"
        parts.append(f'<text x="{x:.0f}" y="42" font-size="13" fill="{COLOURS[number % len(COLOURS)]}">{text}</text>')
    return "\n".join([*parts, "</svg>", ""])


_TICK = 'font-size="12" fill="#555"'


def _share(percent: str) -> float:
    return float(percent.removesuffix("%")) / 100


def _colour(classes: str) -> str:
    number = next(int(name[1:]) for name in classes.split() if name[0] == "c" and name[1:].isdigit())
    return COLOURS[number % len(COLOURS)]


def missed(curve: Curve, starts_below: float | None, ends_above: float | None) -> list[str]:
    """Return the bounds that a curve misses, in words."""
    found = []
    if starts_below is not None and curve.first >= starts_below:
        found.append(f"{curve.name}: the first step has a reward of {curve.first:.3f}, not below {starts_below:g}")
    if ends_above is not None and curve.last <= ends_above:
        found.append(f"{curve.name}: the last {LAST_STEPS} steps have {curve.last:.3f}, not above {ends_above:g}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the reward curves of runs, and check them.")
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--names", nargs="+", help="of the runs in the legend; default: their folders")
    parser.add_argument("--title", default="mean reward of a step")
    parser.add_argument("--out", type=Path, help="SVG file to write")
    parser.add_argument("--starts-below", type=float, help="bound of the first step")
    parser.add_argument("--ends-above", type=float, help=f"bound of the mean of the last {LAST_STEPS} steps")
    arguments = parser.parse_args()
    names = arguments.names or [None] * len(arguments.runs)
    if len(names) != len(arguments.runs):
        parser.error(f"--names has {len(names)} names for {len(arguments.runs)} runs")
    try:
        curves = [read_curve(run, name) for run, name in zip(arguments.runs, names, strict=True)]
    except (OSError, ValueError) as exc:
        parser.error(str(exc))

    for curve in curves:
        print(f"{curve.name}: reward {curve.first:.3f} -> {curve.last:.3f} in {curve.steps[-1]} steps")
    if arguments.out is not None:
        write_atomic(arguments.out, draw(curves, arguments.title).encode())
    faults = [text for curve in curves for text in missed(curve, arguments.starts_below, arguments.ends_above)]
    for text in faults:
        print(text, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
