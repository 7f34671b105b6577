"""Choose the plots and headline numbers of a training run from its metrics (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from agentloop.report.plots import Plot, Series, Value
from agentloop.report.reading import RunRecord
from agentloop.text import clean, finite, mean, number, seconds

Row = dict[str, Any]

FIRST, LAST = 3, 10
"""Most steps that are averaged for the first and for the last reward of the headline. They never
share a step: a short run is divided in halves."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A headline number; with `before`, it reads `before → value`."""

    label: str
    value: str
    note: str
    before: str | None = None
    alarm: bool = False


def verdicts(record: RunRecord) -> list[Verdict]:
    """Return the headline numbers of the run."""
    rows = record.train_rows
    rewards = [value for row in rows if (value := finite(row.get("reward/mean"))) is not None]
    evals = [(row["step"], v) for row in record.rows if (v := finite(row.get("eval/reward_mean"))) is not None]
    step_seconds = [v for row in rows if (v := finite(row.get("step/time_s"))) is not None]
    eval_seconds = [v for row in record.rows if (v := finite(row.get("eval/time_s"))) is not None]
    mismatch = [v for row in rows if (v := finite(row.get("mismatch/logprob_abs_mean"))) is not None]
    episodes = sum(finite(row.get("episode/count")) or 0 for row in rows)
    failed = sum(finite(row.get("episode/failed")) or 0 for row in rows)
    rejected = sum(finite(row.get("episode/rejected")) or 0 for row in rows)
    out = [trend("Training reward", rewards, "no step has a reward")]
    if evals:
        same = len(evals) == 1
        out.append(
            Verdict(
                "Evaluation reward",
                number(evals[-1][1]),
                f"step {evals[0][0]}" + ("" if same else f" → step {evals[-1][0]}"),
                before=None if same else number(evals[0][1]),
            )
        )
    planned = finite(record.setting("run.steps"))
    done = int(rows[-1]["step"]) if rows else 0
    out.append(
        Verdict(
            "Steps",
            f"{done}" + (f" of {planned:.0f}" if planned else ""),
            f"{episodes:,.0f} episodes" if episodes else "",
        )
    )
    if step_seconds:
        out.append(
            Verdict(
                "Time",
                seconds(sum(step_seconds) + sum(eval_seconds)),
                f"{seconds(mean(step_seconds))} a step" + (", evaluations included" if eval_seconds else ""),
            )
        )
    if mismatch:
        out.append(Verdict("Mismatch", number(max(mismatch)), "worst step, mean |Δ logprob|"))
    if any("episode/failed" in row or "episode/rejected" in row for row in rows):
        note = f"failed {failed:.0f}, rejected {rejected:.0f}" if failed or rejected else "no episode failed"
        out.append(Verdict("Failures", f"{failed + rejected:.0f}", note, alarm=bool(failed or rejected)))
    return out


def trend(label: str, values: Sequence[float], missing: str, what: str = "step") -> Verdict:
    """Return the mean of the first values and of the last ones, without overlap.

    Args:
        missing: the note if there is no value.
        what: one value, for the note.
    """
    if len(values) < 2:
        return Verdict(label, number(mean(values)), f"the only {what}" if values else missing)

    first = values[: min(FIRST, len(values) // 2)]
    last = values[len(first) :][-LAST:]
    note = f"first {_counted(first, what)} → last {_counted(last, what)}"
    return Verdict(label, number(mean(last)), note, before=number(mean(first)))


def _counted(values: Sequence[float], what: str) -> str:
    return what if len(values) == 1 else f"{len(values)} {what}s"


def plots(record: RunRecord) -> list[Plot]:
    """Return every plot that the metrics have numbers for."""
    rows = record.rows
    steps = [int(row["step"]) for row in rows]

    def column(key: str) -> list[Value]:
        return [finite(row.get(key)) for row in rows]

    def series(label: str, key: str, colour: int, **options: Any) -> Series:
        return Series(label, column(key), colour, **options)

    all_plots = [
        _reward(rows, steps, column),
        Plot(
            "Response length",
            "Tokens after the prompt, tool output included.",
            steps,
            [
                series("mean", "episode/response_tokens_mean", 1),
                series("longest", "episode/response_tokens_max", 4, dashed=True),
                series("mean in evaluation", "eval/response_tokens_mean", 2, mark=True),
            ],
            low=0,
        ),
        Plot(
            "Turns and tool calls",
            "Per episode.",
            steps,
            [
                series("turns", "episode/turns_mean", 1),
                series("tool calls", "episode/tool_calls_mean", 2),
                series("tool errors", "episode/tool_errors_mean", 5, dashed=True),
                series("malformed calls", "episode/malformed_calls_mean", 4, dashed=True),
            ],
            low=0,
        ),
        _endings(rows, steps),
        Plot(
            "Mismatch",
            "Engine against trainer on the same tokens, log scale; exact zeros lie on the lower edge.",
            steps,
            [
                series("mean |Δ logprob|", "mismatch/logprob_abs_mean", 1),
                series("k3", "mismatch/k3", 2, dashed=True),
            ],
            log=True,
        ),
        Plot(
            "Staleness",
            "Versions that the oldest trained token was behind.",
            steps,
            [series("largest", "staleness/max", 3)],
            low=0,
            integer=True,
        ),
        _timing(column, steps),
        Plot(
            "Throughput",
            "Tokens a second: sampled by the engine, processed by the trainer.",
            steps,
            [series("rollout", "rollout/tokens_per_s", 1), series("training", "train/tokens_per_s", 2)],
            low=0,
        ),
        Plot(
            "Entropy",
            "Nats a token, of the policy that is trained.",
            steps,
            [series("entropy", "train/entropy", 1)],
            low=0,
        ),
        Plot("Gradient norm", "Before clipping.", steps, [series("gradient norm", "train/grad_norm", 3)], low=0),
        Plot(
            "Clip fraction",
            "Share of tokens whose ratio the loss clips.",
            steps,
            [series("clipped", "train/clip_frac", 5)],
            low=0,
        ),
        Plot("Loss", "Policy loss; it need not fall.", steps, [series("loss", "train/loss", 4)]),
        Plot("KL to the initial policy", "k3 estimate, nats a token.", steps, [series("KL", "train/kl_ref", 2)], low=0),
        Plot("Learning rate", "At the step's last update.", steps, [series("learning rate", "train/lr", 1)], low=0),
    ]
    return [plot for plot in all_plots if not plot.empty and not _is_constant(plot)]


def _reward(rows: Sequence[Row], steps: Sequence[int], column: Callable[[str], list[Value]]) -> Plot:
    means, evals = column("reward/mean"), column("eval/reward_mean")
    known = [value for value in (*means, *evals) if value is not None]
    unit = bool(known) and min(known) >= 0 and max(known) <= 1
    return Plot(
        "Reward",
        "Mean of a step's episodes; the band is one standard deviation of them"
        + (", cut at 0 and 1." if unit else "."),
        steps,
        [
            Series("training", means, 1, spread=column("reward/std")),
            Series("evaluation", evals, 2, mark=True),
        ],
        wide=True,
        low=0.0 if unit else None,
        high=1.0 if unit else None,
    )


def _endings(rows: Sequence[Row], steps: Sequence[int]) -> Plot:
    """Plot the share of episodes by stop reason; rare reasons are combined."""
    totals: dict[str, float] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("stop/"):
                totals[key] = totals.get(key, 0.0) + (finite(value) or 0.0)
    reasons = sorted((key for key, total in totals.items() if total > 0), key=lambda key: (-totals[key], key))
    named, rest = (reasons, []) if len(reasons) <= 5 else (reasons[:4], reasons[4:])

    def share(keys: Sequence[str]) -> list[Value]:
        out: list[Value] = []
        for row in rows:
            total = sum(finite(row.get(reason)) or 0.0 for reason in reasons)
            out.append(sum(finite(row.get(key)) or 0.0 for key in keys) / total if total else None)
        return out

    groups = [(clean(key.removeprefix("stop/"), 24), [key]) for key in named] + ([("other", rest)] if rest else [])
    return Plot(
        "How episodes end",
        "Share of a step's episodes by stop reason.",
        steps,
        [
            Series(label, share(keys), index % 5 + 1, stacked=True, show=_percentage)
            for index, (label, keys) in enumerate(groups)
        ],
        low=0.0,
        high=1.0,
        unit="%",
    )


def _timing(column: Callable[[str], list[Value]], steps: Sequence[int]) -> Plot:
    """Plot a step's seconds on the trainer's side; the parallel rollout is a separate line."""
    waiting, training, publishing = column("train/wait_s"), column("train/time_s"), column("publish/time_s")
    rollout, whole = column("rollout/time_s"), column("step/time_s")
    rest: list[Value] = []
    for total, *parts in zip(whole, waiting, training, publishing, strict=True):
        rest.append(max(0.0, total - sum(part or 0.0 for part in parts)) if total is not None else None)
    stages = [
        Series("waiting for rollout", waiting, 1, stacked=True, show=seconds),
        Series("training", training, 2, stacked=True, show=seconds),
        Series("publishing", publishing, 3, stacked=True, show=seconds),
        Series("other", rest, 5, stacked=True, show=seconds),
    ]
    return Plot(
        "Seconds per step",
        "Time of the trainer, stacked. The rollout of the same episodes runs in parallel.",
        steps,
        [*stages, Series("rollout", rollout, 4, dashed=True, show=seconds)],
        low=0,
        unit="s",
    )


def _is_constant(plot: Plot) -> bool:
    """Whether a plot is constant: KL that is never computed, or a constant learning rate."""
    if plot.title not in ("KL to the initial policy", "Learning rate"):
        return False
    known = {value for value in plot.series[0].values if value is not None}
    return len(known) < 2


def _percentage(value: Value) -> str:
    return "–" if value is None else f"{value * 100:.3g}%"
