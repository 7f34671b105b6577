"""Check that runs learned: how far their reward rose, and whether it kept its bounds.

    python -m recipes.bounds outputs/RUN [outputs/RUN ...] --starts-below 0.35 --ends-above 0.8
    python -m recipes.bounds outputs/RUN --evaluated-from 0.1 --evaluated-to 0.95
    python -m recipes.bounds outputs/CONTROL --ends-below 0.2

Prints `reward/mean` of the first step and the mean of the last five, and the first and the last
evaluation, from each run's `metrics.jsonl`. The exit code is 1 if a run misses a bound.
`agentloop report RUN --picture FILE` draws the curve.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import orjson

LAST_STEPS = 5
"""The end of a curve is the mean of this many steps: one step of sampled episodes is noisy."""


@dataclass(frozen=True)
class Curve:
    """The rewards of one run, step by step, and of its evaluations."""

    name: str
    rewards: list[float]
    evaluations: list[float]

    @property
    def first(self) -> float:
        return self.rewards[0]

    @property
    def last(self) -> float:
        return statistics.fmean(self.rewards[-LAST_STEPS:])


def read_curve(run: Path) -> Curve:
    """Read a run's folder.

    Raises:
        OSError: there is no `metrics.jsonl`.
        ValueError: no step has a reward.
    """
    lines = [orjson.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines() if line.strip()]
    rewards, evaluations = (
        [reward for line in lines if (reward := line.get(key)) is not None]
        for key in ("reward/mean", "eval/reward_mean")
    )
    if not rewards:
        raise ValueError(f"{run}/metrics.jsonl: no step has a reward/mean")
    return Curve(str(run), rewards, evaluations)


def missed(
    curve: Curve,
    starts_below: float | None,
    ends_above: float | None,
    evaluated_from: float | None = None,
    evaluated_to: float | None = None,
    ends_below: float | None = None,
) -> list[str]:
    """Return the bounds that a curve misses, in words.

    Args:
        starts_below, ends_above: bounds of the first step and of the last ones.
        evaluated_from, evaluated_to: the highest first and the lowest last evaluation.
        ends_below: bound of the last steps of a control, which is not to learn.
    """
    found = []
    if (evaluated_from, evaluated_to) != (None, None) and len(curve.evaluations) < 2:
        return [f"{curve.name}: it was evaluated less than twice"]
    if evaluated_from is not None and curve.evaluations[0] > evaluated_from:
        found.append(f"{curve.name}: the first evaluation is {curve.evaluations[0]:.3f}, above {evaluated_from:g}")
    if evaluated_to is not None and curve.evaluations[-1] < evaluated_to:
        found.append(f"{curve.name}: the last evaluation is {curve.evaluations[-1]:.3f}, below {evaluated_to:g}")
    if starts_below is not None and curve.first >= starts_below:
        found.append(f"{curve.name}: the first step has a reward of {curve.first:.3f}, not below {starts_below:g}")
    if ends_above is not None and curve.last <= ends_above:
        found.append(f"{curve.name}: the last {LAST_STEPS} steps have {curve.last:.3f}, not above {ends_above:g}")
    if ends_below is not None and curve.last >= ends_below:
        found.append(f"{curve.name}: the last {LAST_STEPS} steps have {curve.last:.3f}, not below {ends_below:g}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Check how far the reward of runs rose.")
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--starts-below", type=float, help="bound of the first step")
    parser.add_argument("--ends-above", type=float, help=f"bound of the mean of the last {LAST_STEPS} steps")
    parser.add_argument("--ends-below", type=float, help="the opposite bound, of a control that is not to learn")
    parser.add_argument("--evaluated-from", type=float, help="highest first evaluation")
    parser.add_argument("--evaluated-to", type=float, help="lowest last evaluation")
    arguments = parser.parse_args()
    given = (
        arguments.starts_below, arguments.ends_above, arguments.evaluated_from, arguments.evaluated_to,
        arguments.ends_below,
    )  # fmt: skip
    try:
        curves = [read_curve(run) for run in arguments.runs]
    except (OSError, ValueError) as exc:
        parser.error(str(exc))

    faults = []
    for curve in curves:
        print(f"{curve.name}: reward {curve.first:.3f} -> {curve.last:.3f} in {len(curve.rewards)} steps")
        if curve.evaluations:
            print(f"{curve.name}: evaluated {curve.evaluations[0]:.3f} -> {curve.evaluations[-1]:.3f}")
        faults += missed(curve, *given)
    for text in faults:
        print(text, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
