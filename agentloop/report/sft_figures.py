"""Choose the plots and the headline numbers of an SFT run from its metrics (docs/sft.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from agentloop.report.figures import Verdict, trend
from agentloop.report.plots import Plot, Series, Value
from agentloop.report.reading import RunRecord
from agentloop.text import clean, finite, mean, number, seconds


def sft_verdicts(record: RunRecord) -> list[Verdict]:
    """Return the headline numbers of the run."""

    def known(key: str) -> list[float]:
        return [value for row in record.rows if (value := finite(row.get(key))) is not None]

    losses, evals, speeds = known("loss"), known("eval/loss"), known("tokens_per_s")
    out = [trend("Training loss", losses, "no line has a loss", "log line")]
    if evals:
        before = number(evals[0]) if len(evals) > 1 else None
        out.append(Verdict("Evaluation loss", number(evals[-1]), "first → last evaluation" if before else "", before))
    if record.rows:
        last = record.rows[-1]
        planned = finite(last.get("steps"))
        stages = record.config.get("stages")
        note = f"{len(stages)} stage{'s' * (len(stages) > 1)}" if isinstance(stages, list) else ""
        out.append(Verdict("Steps", f"{int(last['step'])}" + (f" of {planned:.0f}" if planned else ""), note))
    if times := known("time_s"):
        out.append(Verdict("Time", seconds(sum(times) + sum(known("eval/time_s"))), "training and evaluations"))
    if speeds:
        out.append(Verdict("Speed", number(mean(speeds)), "tokens a second"))
    return out


def sft_plots(record: RunRecord) -> list[Plot]:
    """Return every plot that the metrics have numbers for."""
    steps = [int(row["step"]) for row in record.rows]

    def series(label: str, key: str, colour: int, show: Callable[[Value], str] = number, mark: bool = False) -> Series:
        values = [finite(row.get(key)) for row in record.rows]
        return Series(label, values, colour, show=show, mark=mark)

    def plot(title: str, note: str, *lines: Series, low: Value = None, wide: bool = False) -> Plot:
        return Plot(title, note, steps, list(lines), low=low, wide=wide)

    all_plots = [
        plot(
            "Loss",
            "Nats a trained token; in training weighted as loss_aggregation says, in evaluations by token.",
            series("training", "loss", 1),
            series("evaluation", "eval/loss", 2, mark=True),
            wide=True,
        ),
        plot("Entropy", "Nats a token.", series("entropy", "entropy", 1), low=0),
        plot("Gradient norm", "Before clipping.", series("gradient norm", "grad_norm", 3), low=0),
        plot("Learning rate", "Each stage has its own schedule.", series("learning rate", "lr", 1), low=0),
        plot("Throughput", "Packed tokens a second.", series("training", "tokens_per_s", 2), low=0),
    ]
    return [plot for plot in all_plots if not plot.empty]


def sft_subtitle(record: RunRecord) -> list[str]:
    """Return what the run did, in a few words each."""
    stages = record.config.get("stages")
    names = [clean(stage.get("name", ""), 30) for stage in stages or () if isinstance(stage, dict)]
    return ["supervised fine-tuning", *_joined(names)]


def _joined(names: Sequence[str]) -> list[str]:
    known = [name for name in names if name]
    return ["stages " + ", ".join(known)] if len(known) > 1 else []
