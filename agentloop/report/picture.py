"""One plot of a run, or of several runs over each other, as an SVG file for a README or a note."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from agentloop.errors import ConfigError
from agentloop.files import write_atomic
from agentloop.report.figures import plots
from agentloop.report.plots import HEIGHT, WIDTH, Plot, Series
from agentloop.report.reading import RunRecord
from agentloop.report.sft_figures import sft_plots
from agentloop.text import clean

LEFT, TOP, RIGHT, BOTTOM = 60.0, 52.0, 20.0, 44.0
"""Space around the frame, for numbers and texts."""

LEGEND_LINES = 2

COLOURS = ("#2563c9", "#d2670b", "#0b8a72", "#8747c9", "#c2364f")
"""Those of the report."""

TEXT, GRID = "#30343b", "#d8dbe0"

STROKES = {"line": "2.5", "thin": "1.5"}


def write_picture(run_dirs: Sequence[Path], title: str, file: Path) -> Path:
    """Write a plot of the report as an SVG.

    Args:
        run_dirs: run directories. With several of them, the plot has one curve of each quantity for
            each run, named by its directory.
        title: of the plot, as the report shows it, e.g. `Reward`; case is ignored.

    Returns:
        `file`. It is renamed into place when it is complete.

    Raises:
        ConfigError: a run has no plot of that title; the message lists those it has.
    """
    found = [_plot(run, title) for run in run_dirs]
    names = [run.resolve().name for run in run_dirs]
    plot = found[0] if len(found) == 1 else overlaid(found, names)
    write_atomic(file, svg(plot).encode())
    return file


def _plot(run_dir: Path, title: str) -> Plot:
    record = RunRecord.read(run_dir)
    known = (sft_plots if record.is_sft else plots)(record)
    for plot in known:
        if plot.title.lower() == title.lower():
            return plot
    titles = ", ".join(plot.title for plot in known)
    raise ConfigError(f"{run_dir} has no plot {title!r}", f"choose from: {titles}" if titles else "it has no steps yet")


def overlaid(found: Sequence[Plot], names: Sequence[str]) -> Plot:
    """Return one plot with the curves of several, over all their steps; each run has a colour."""
    steps = sorted({step for plot in found for step in plot.steps})
    series = []
    for number, (plot, name) in enumerate(zip(found, names, strict=True)):
        for one in plot.series:
            values = dict(zip(plot.steps, one.values, strict=True))
            series.append(
                Series(
                    f"{name}: {one.label}", [values.get(step) for step in steps], number % len(COLOURS) + 1,
                    mark=one.mark, dashed=one.dashed, show=one.show,
                )
            )  # fmt: skip
    first = found[0]
    return Plot(first.title, "", steps, series, log=first.log, low=first.low, high=first.high, unit=first.unit)


def svg(plot: Plot) -> str:
    """Return a drawn plot as an SVG document, with its own texts and colours."""
    drawn = plot.draw()
    width, height = LEFT + WIDTH + RIGHT, TOP + HEIGHT + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif" '
        f'font-size="15" fill="{TEXT}" role="img">',
        f"<title>{escape(drawn['title'])}</title>",
        f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>',
        *_legend(drawn),
        f'<g transform="translate({LEFT:g} {TOP:g})">',
        *_axes(drawn),
        *(_shape(shape) for shape in drawn["shapes"]),
        *(_mark(mark) for mark in drawn["marks"]),
        "</g>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _legend(drawn: dict[str, Any]) -> list[str]:
    """Texts side by side above the frame, each beside its colour, in as many lines as fit there."""
    parts = [f'<text x="{LEFT:g}" y="22" font-weight="bold">{escape(drawn["title"])}</text>']
    begin = LEFT + 12.0 * (len(drawn["title"]) + 2)
    left, line = begin, 0
    for entry in drawn["legend"]:
        text = clean(f"{entry['label']} {entry['last']}")  # the name of a folder may hold anything
        colour = COLOURS[entry["colour"] - 1]
        if left > begin and left + 9.0 * len(text) > LEFT + WIDTH:
            left, line = begin, line + 1
        if line == LEGEND_LINES:  # the rest would not be legible: it is in the report
            break
        y = 12 + 18 * line
        parts.append(f'<rect x="{left:g}" y="{y}" width="18" height="5" fill="{colour}"/>')
        parts.append(f'<text x="{left + 24:g}" y="{y + 10}">{escape(text)}</text>')
        left += 24 + 8.2 * len(text) + 18
    return parts


def _axes(drawn: dict[str, Any]) -> list[str]:
    parts = []
    for tick in drawn["y_ticks"]:
        y = HEIGHT * _fraction(tick["top"])
        parts.append(f'<path d="M0 {y:.1f}H{WIDTH:g}" stroke="{GRID}"/>')
        parts.append(f'<text x="-10" y="{y + 5:.1f}" text-anchor="end">{escape(tick["label"])}</text>')
    for tick in drawn["x_ticks"]:
        x = WIDTH * _fraction(tick["left"])
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT + 22:g}" text-anchor="middle">{escape(tick["label"])}</text>')
    parts.append(f'<text x="{WIDTH:g}" y="{HEIGHT + 40:g}" text-anchor="end">step</text>')
    return parts


def _shape(shape: dict[str, str]) -> str:
    kind, colour, *rest = shape["class"].split()
    hue = COLOURS[int(colour.removeprefix("c")) - 1]
    if kind in STROKES:
        dash = ' stroke-dasharray="6 5"' if "dashed" in rest else ""
        return (
            f'<path d="{shape["d"]}" fill="none" stroke="{hue}" stroke-width="{STROKES[kind]}" '
            f'stroke-linecap="round"{dash}/>'
        )
    return f'<path d="{shape["d"]}" fill="{hue}" fill-opacity="{"0.15" if kind == "band" else "0.8"}"/>'


def _mark(mark: dict[str, str]) -> str:
    x, y = WIDTH * _fraction(mark["left"]), HEIGHT * _fraction(mark["top"])
    hue = COLOURS[int(mark["class"].removeprefix("c")) - 1]
    return f'<path d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z" fill="{hue}"/>'


def _fraction(percent: str) -> float:
    return float(percent.removesuffix("%")) / 100
