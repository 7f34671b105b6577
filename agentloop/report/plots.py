"""Line and area plots as SVG geometry, independent of what is plotted.

The drawing is stretched to the width of its card (`preserveAspectRatio="none"`, with strokes that
do not scale). All text is HTML, positioned in percent, so that a plot is legible on a phone and on
a desk without any script.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from agentloop.text import number

WIDTH, HEIGHT = 1000.0, 300.0
MAX_POINTS = 500
"""Longer runs are drawn as means over equal intervals of steps."""

LARGEST = 1e150
"""Values beyond are drawn as this."""

Value = float | None
Unit = Literal["", "s", "%"]


@dataclass(slots=True)
class Series:
    """One quantity over the steps; None where a step lacks it.

    `spread` draws a band of value ± spread. `mark` draws diamonds joined by a thin dashed line.
    """

    label: str
    values: Sequence[Value]
    colour: int
    spread: Sequence[Value] | None = None
    mark: bool = False
    dashed: bool = False
    stacked: bool = False
    show: Callable[[Value], str] = number

    @property
    def empty(self) -> bool:
        return all(value is None for value in self.values)


@dataclass(slots=True)
class Plot:
    """A plot of one or more series over `steps`."""

    title: str
    note: str
    steps: Sequence[int]
    series: list[Series]
    log: bool = False
    wide: bool = False
    low: Value = None
    high: Value = None
    integer: bool = False
    unit: Unit = ""

    @property
    def empty(self) -> bool:
        return all(series.empty for series in self.series)

    def draw(self) -> dict[str, Any]:
        """Return paths, marks, ticks, legend and tooltip numbers for the template."""
        series = [_bounded(s) for s in self.series if not s.empty]
        steps, series, interval = _shorten(self.steps, series)
        x_low, x_high = float(min(steps)), float(max(steps))
        if x_low == x_high:
            x_low, x_high = x_low - 0.5, x_high + 0.5
        scale = self._scale(series)
        x = [(step - x_low) / (x_high - x_low) for step in steps]
        shapes: list[dict[str, str]] = []
        marks: list[dict[str, str]] = []
        columns = zip(*(s.values for s in series if s.stacked), strict=True)
        base: list[Value] = [None if all(v is None for v in column) else 0.0 for column in columns]
        for s in series:
            if s.stacked:
                top = [None if b is None else b + (v or 0.0) for b, v in zip(base, s.values, strict=True)]
                shapes.append({"class": f"area c{s.colour}", "d": _between(x, base, top, scale)})
                base = top
        for s in series:
            if s.stacked:
                continue
            if s.spread is not None:
                pairs = list(zip(s.values, s.spread, strict=True))
                low = [v - (d or 0.0) if v is not None else None for v, d in pairs]
                high = [v + (d or 0.0) if v is not None else None for v, d in pairs]
                shapes.append({"class": f"band c{s.colour}", "d": _between(x, low, high, scale)})
            kind = "thin" if s.mark else "line"
            dash = " dashed" if s.mark or s.dashed else ""
            shapes.append({"class": f"{kind} c{s.colour}{dash}", "d": _line(x, s.values, scale, joined=s.mark)})
            if s.mark:
                marks += [
                    {"class": f"c{s.colour}", "left": _percent(px), "top": _percent(1 - scale(v))}
                    for px, v in zip(x, s.values, strict=True)
                    if v is not None
                ]
        return {
            "title": self.title,
            "note": self.note + (f" Each point is the mean of {interval} steps." if interval > 1 else ""),
            "wide": self.wide,
            "shapes": shapes,
            "marks": marks,
            "y_ticks": [{"top": _percent(1 - scale(v)), "label": label} for v, label in scale.ticks(self.unit)],
            "x_ticks": _x_ticks(x_low, x_high),
            "legend": [
                {"label": s.label, "colour": s.colour, "kind": _kind(s), "last": s.show(_last(s.values))}
                for s in series
            ],
            "data": {
                "at": [round(value, 4) for value in x],
                "steps": list(steps),
                "series": [
                    {"label": s.label, "colour": s.colour, "kind": _kind(s), "text": _texts(s)}
                    for s in _top_down(series)
                ],
            },
        }

    def _scale(self, series: Sequence[Series]) -> Scale:
        values: list[float] = []
        stacked = [s for s in series if s.stacked]
        if stacked:
            values.append(0.0)
            values += [sum(v or 0.0 for v in column) for column in zip(*(s.values for s in stacked), strict=True)]
        for s in series:
            if not s.stacked:
                spread = s.spread or [None] * len(s.values)
                for v, d in zip(s.values, spread, strict=True):
                    if v is not None:
                        values += [v - (d or 0.0), v + (d or 0.0)] if d else [v]
        if self.log:
            return LogScale.over([v for v in values if v > 0])
        low = min(values) if self.low is None else self.low
        high = max(values) if self.high is None else self.high
        return LinearScale.over(low, high, fixed=(self.low is not None, self.high is not None), integer=self.integer)


def _top_down(series: Sequence[Series]) -> list[Series]:
    """Order stacked series from top to bottom, then the others."""
    return [s for s in reversed(series) if s.stacked] + [s for s in series if not s.stacked]


@dataclass(slots=True)
class LinearScale:
    """Map a value to a height: 0 at the bottom, 1 at the top, clipped to the frame."""

    low: float
    high: float
    step: float

    @classmethod
    def over(cls, low: float, high: float, *, fixed: tuple[bool, bool], integer: bool) -> LinearScale:
        """Return a scale with round ends; a `fixed` end stays."""
        if high <= low:
            pad = abs(high) * 0.1 or 1.0
            low, high = (low if fixed[0] else low - pad), high + pad
        step = _nice((high - low) / 4)
        if integer:
            step = max(1.0, math.ceil(step))
        if not fixed[0]:
            low = math.floor(low / step + 1e-9) * step
        if not fixed[1]:
            high = math.ceil(high / step - 1e-9) * step
        return cls(low, high, step)

    def __call__(self, value: float) -> float:
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def ticks(self, unit: Unit) -> list[tuple[float, str]]:
        first = math.ceil(self.low / self.step - 1e-9)
        last = math.floor(self.high / self.step + 1e-9)
        factor = 100.0 if unit == "%" else 1.0
        step = self.step * factor
        decimals = next((d for d in range(4) if abs(step * 10**d - round(step * 10**d)) < 1e-6 * step * 10**d), None)

        def label(value: float) -> str:
            largest = max(abs(self.low), abs(self.high)) * factor
            for bound, suffix in ((1e6, "M"), (1e3, "k")):
                if largest >= 10 * bound:
                    return f"{value / bound:g}{suffix}{unit}" if value else "0"
            if decimals is None:
                return number(value) + unit
            return f"{value * factor:.{decimals}f}{unit}"

        return [(index * self.step, label(index * self.step)) for index in range(first, last + 1)]


@dataclass(slots=True)
class LogScale:
    """Whole decades. Zero and negative values lie on the bottom edge."""

    low: int
    high: int

    @classmethod
    def over(cls, positive: Sequence[float]) -> LogScale:
        if not positive:
            return cls(-9, -6)
        low = math.floor(math.log10(min(positive)))
        high = math.ceil(math.log10(max(positive)))
        return cls(low, max(high, low + 1))

    def __call__(self, value: float) -> float:
        if value <= 0:
            return 0.0
        return min(1.0, max(0.0, (math.log10(value) - self.low) / (self.high - self.low)))

    def ticks(self, unit: Unit) -> list[tuple[float, str]]:
        every = max(1, math.ceil((self.high - self.low) / 5))
        exponents = range(self.low, self.high + 1, every)
        return [(10.0**e, (f"1e{e}" if not -3 < e < 3 else f"{10.0**e:g}") + unit) for e in exponents]


Scale = LinearScale | LogScale


def _nice(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return power * next(factor for factor in (1, 2, 2.5, 5, 10) if raw <= factor * power * 1.0001)


def _x_ticks(low: float, high: float) -> list[dict[str, str]]:
    step = max(1.0, math.ceil(_nice(max(1.0, high - low) / 6)))
    first, last = math.ceil(low / step), math.floor(high / step)
    return [
        {"left": _percent((index * step - low) / (high - low)), "label": f"{index * step:.0f}"}
        for index in range(first, last + 1)
    ]


def _line(x: Sequence[float], values: Sequence[Value], scale: Scale, *, joined: bool) -> str:
    """Return a path that breaks at missing values unless `joined`. An isolated point is a dot."""
    parts: list[str] = []
    pen_down = False
    for index, (px, value) in enumerate(zip(x, values, strict=True)):
        if value is None:
            pen_down = pen_down and joined
            continue
        point = _point(px, scale(value))
        if pen_down:
            parts.append(f"L{point}")
        else:
            alone = index + 1 >= len(values) or values[index + 1] is None
            parts.append(f"M{point}" + ("h0" if alone and not joined else ""))
        pen_down = True
    return "".join(parts)


def _between(x: Sequence[float], low: Sequence[Value], high: Sequence[Value], scale: Scale) -> str:
    """Return the area between two lines, split at gaps."""
    parts: list[str] = []
    run: list[tuple[float, float, float]] = []

    def flush() -> None:
        if run:
            if len(run) == 1:  # an isolated step: a bar, one hundredth of the plot wide
                px, bottom, top = run[0]
                run[:] = [(max(0.0, px - 0.005), bottom, top), (min(1.0, px + 0.005), bottom, top)]
            forth = "L".join(_point(px, top) for px, _, top in run)
            back = "L".join(_point(px, bottom) for px, bottom, _ in reversed(run))
            parts.append(f"M{forth}L{back}Z")
            run.clear()

    for px, bottom, top in zip(x, low, high, strict=True):
        if bottom is None or top is None:
            flush()
        else:
            run.append((px, scale(bottom), scale(top)))
    flush()
    return "".join(parts)


def _point(x: float, height: float) -> str:
    return f"{x * WIDTH:.1f} {(1 - height) * HEIGHT:.1f}"


def _percent(fraction: float) -> str:
    return f"{fraction * 100:.2f}%"


def _kind(series: Series) -> str:
    return "block" if series.stacked else "diamond" if series.mark else "dash" if series.dashed else "stroke"


def _texts(series: Series) -> list[str]:
    if series.spread is None:
        return [series.show(value) if value is not None else "" for value in series.values]
    return [
        "" if value is None else series.show(value) + (f" ± {series.show(spread)}" if spread is not None else "")
        for value, spread in zip(series.values, series.spread, strict=True)
    ]


def _last(values: Sequence[Value]) -> Value:
    return next((value for value in reversed(values) if value is not None), None)


def _bounded(series: Series) -> Series:
    """Return a series whose sums and differences are finite: a run may diverge to any number."""
    if all(value is None or abs(value) <= LARGEST for value in (*series.values, *(series.spread or ()))):
        return series

    def cut(values: Sequence[Value]) -> list[Value]:
        return [None if value is None else max(-LARGEST, min(LARGEST, value)) for value in values]

    return replace(series, values=cut(series.values), spread=series.spread and cut(series.spread))


def _shorten(steps: Sequence[int], series: list[Series]) -> tuple[list[int], list[Series], int]:
    """Reduce to at most `MAX_POINTS` points: means over intervals; marks keep the last value."""
    interval = math.ceil(len(steps) / MAX_POINTS)
    if interval <= 1:
        return list(steps), series, 1
    cuts = range(0, len(steps), interval)

    def means(values: Sequence[Value], *, last: bool = False) -> list[Value]:
        out: list[Value] = []
        for cut in cuts:
            known = [value for value in values[cut : cut + interval] if value is not None]
            out.append((known[-1] if last else sum(known) / len(known)) if known else None)
        return out

    shortened = [
        Series(
            label=s.label,
            values=means(s.values, last=s.mark),
            colour=s.colour,
            spread=means(s.spread) if s.spread is not None else None,
            mark=s.mark,
            dashed=s.dashed,
            stacked=s.stacked,
            show=s.show,
        )
        for s in series
    ]
    return [steps[min(cut + interval, len(steps)) - 1] for cut in cuts], shortened, interval
