"""The stream that a command writes to.

On a terminal, a progress bar is at the bottom and lines have some colour. Anywhere else (a pipe, a
file, CI, NO_COLOR), the same lines are plain text without control codes, so that they can be
searched and kept.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from agentloop.text import clean, finite, number, seconds
from trainer.console.lines import Metrics, eval_line, fit_columns, header_line, step_line
from trainer.console.samples import sample_lines
from trainer.console.stream import LossyStream

HEADER_EVERY = 20
"""Steps between two header lines."""

PLAIN_WIDTH = 100
"""Columns to which samples are wrapped when the output is not a terminal."""

WIDEST = 120
"""Columns to which samples are wrapped on a wide terminal."""

ETA_STEPS = 20
"""The remaining time is estimated from this many steps."""

EPISODES, TRAINING = "episodes", "trained groups"
"""Labels of the progress within a step: its episodes, then the groups trained of them."""

STEP_REPORTS = 3
"""A step reports this many times more rarely than a phase when there is no bar: it has a line of
its own at its end, and only a step that takes long needs more."""

REPORT_EVERY_S = 10.0
"""Seconds between two progress reports of a phase or an evaluation when there is no bar."""


class Console:
    """Print a command's progress, for a terminal or a log file.

    Args:
        file: stream to write to; None: standard output.
        terminal: whether to draw a progress bar and colours; None: detect.
        report_every_s: seconds between two progress reports when there is no bar.
    """

    def __init__(
        self, file: TextIO | None = None, *, terminal: bool | None = None, report_every_s: float = REPORT_EVERY_S
    ) -> None:
        stream = cast(TextIO, LossyStream(file or sys.stdout))
        self._terminal = _is_terminal(stream) if terminal is None else terminal
        self._rich = RichConsole(
            file=stream,
            force_terminal=self._terminal,
            color_system="auto" if self._terminal else None,
            markup=False,
            emoji=False,
            highlight=False,
            width=None if self._terminal else PLAIN_WIDTH,
        )
        encoding = (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "")
        self._encoding = None if encoding.startswith("utf") else encoding
        self._live: Live | None = None
        self._phase: str | None = None
        self._phase_began = 0.0
        self._phase_note = ""
        self._report_every_s = report_every_s
        self._reported_at = 0.0
        self._reported_label = ""
        self._step_reported_at: float | None = None
        self._line_open = False
        self._lines_since_header: int | None = None
        self._progress: tuple[int, int, str] | None = None
        self._step = 0
        self._total = 0
        self._durations: list[float] = []
        self._first_eval: float | None = None
        self._evals = 0
        self._spinner = Spinner("dots")

    # -- set-up ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name a phase of the set-up; print how long it took, or that it failed."""
        begin = time.monotonic()
        outer, self._phase, self._phase_began = (self._phase, self._phase_began), name, begin
        self._phase_note, self._reported_at = "", begin
        if self._terminal:
            self._show_live()
        else:
            self._close_line()
            self._rich.file.write(self._encodable(f"{name} ... "))
            self._rich.file.flush()
            self._line_open = True

        outcome, style = "failed after ", "red"
        try:
            yield
            outcome, style = "", "green"
        except (KeyboardInterrupt, GeneratorExit):
            outcome = "stopped after "
            raise
        finally:
            self._phase, self._phase_began = outer
            self._phase_note = ""
            took = f"{outcome}{seconds(time.monotonic() - begin)}"
            if self._terminal:
                if self._phase is None and self._progress is None:
                    self._stop_live()
                mark = "✓" if not outcome else "✗"
                self._print(Text.assemble((f"{mark} ", style), f"{name:<36} ", (took, "dim" if not outcome else "red")))
            elif self._line_open:
                self._line_open = False
                self._rich.file.write(f"{took}\n")
                self._rich.file.flush()
            else:
                self._print(f"{name} ... {took}")

    def phase_progress(self, done: int, total: int) -> None:
        """Report the progress of the current phase. Cheap: it prints rarely, and draws nothing."""
        self._phase_note = f"{done:,}/{total:,}"
        if not self._terminal and self._line_open and time.monotonic() - self._reported_at >= self._report_every_s:
            self._reported_at = time.monotonic()
            self._rich.file.write(f"{self._phase_note} ... ")
            self._rich.file.flush()

    # -- the steps ---------------------------------------------------------------------------------

    def progress(self, done: int, total: int, label: str) -> None:
        """Report progress within a step or an evaluation. Cheap: drawn four times a second."""
        self._progress = (done, total, label)
        if self._terminal and self._live is None:
            self._show_live()
        if self._terminal:
            return
        if label in (EPISODES, TRAINING):
            self._report_step(done, total, label)
            return
        now = time.monotonic()
        if self._reported_label != label:
            self._reported_label, self._reported_at = label, now
        elif done < total and now - self._reported_at >= self._report_every_s:
            self._reported_at = now
            self._print(f"{label} {done:,}/{total:,}")
        if done >= total:
            self._reported_label = ""

    def _report_step(self, done: int, total: int, label: str) -> None:
        """Print that a long step goes on. A short one has its own line soon."""
        now = time.monotonic()
        if self._step_reported_at is None:
            self._step_reported_at = now
        elif done < total and now - self._step_reported_at >= STEP_REPORTS * self._report_every_s:
            self._step_reported_at = now
            self._print(f"step {self._step + 1}: {label} {done:,}/{total:,}")

    def step(self, metrics: Metrics, total_steps: int) -> None:
        """Print the line of a finished step. Keys as in docs/metrics.md; any may be missing."""
        self._step, self._total = int(finite(metrics.get("step")) or 0), total_steps
        duration = finite(metrics.get("step/time_s"))
        if duration is not None:
            self._durations = [*self._durations[1 - ETA_STEPS :], duration]

        self._step_reported_at = None
        self._progress = (0, 0, EPISODES) if self._step < total_steps else None
        if self._progress is None:
            self._stop_live()
        elif self._terminal:
            self._show_live()

        columns, gap = fit_columns(total_steps, self._width)
        if self._lines_since_header is None or self._lines_since_header >= HEADER_EVERY:
            self._print(header_line(columns, gap))
            self._lines_since_header = 0
        self._lines_since_header += 1
        self._print(step_line(metrics, total_steps, columns, gap, self._width))

    def eval(self, metrics: Metrics) -> None:
        """Print the line of an evaluation; later ones are compared with the first."""
        self._evals += 1
        if self._first_eval is None:
            self._first_eval = finite(metrics.get("eval/reward_mean"))
        line = eval_line(metrics, self._first_eval if self._evals > 1 else None)

        self._progress = None if self._step in (0, self._total) else (0, 0, EPISODES)
        if self._progress is None:
            self._stop_live()
        self._print(line)

    def resumed(self, step: int, first_eval: float | None) -> None:
        """Count on from `step`, and compare evaluations with the first one of the whole run."""
        self._step = step
        if first_eval is not None:
            self._first_eval, self._evals = first_eval, 1

    def samples(self, samples: Sequence[dict[str, Any]]) -> None:
        """Print decoded episodes; `samples.sample_lines` names the keys."""
        for sample in samples:
            self._print("")
            for line in sample_lines(sample, self._rich, min(self._width or PLAIN_WIDTH, WIDEST)):
                self._print(line)
        if samples:
            self._print("")
            self._lines_since_header = None  # the samples separate the step lines from their header

    # -- messages ----------------------------------------------------------------------------------

    def notice(self, text: str) -> None:
        """Print an informational message."""
        self._print(Text(clean(text)))

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._print(Text.assemble(("warning: ", "bold yellow"), clean(text)))

    def summary(
        self,
        *,
        run_dir: Path,
        report: Path | None,
        first_reward: float | None,
        last_reward: float | None,
        eval_first: float | None,
        eval_last: float | None,
        seconds: float,
    ) -> None:
        """Print how the run ended and where its files are."""
        self.close()

        rows: list[tuple[str, str, str]] = []
        if first_reward is not None or last_reward is not None:
            rows.append(("training reward", f"{number(first_reward)} -> {number(last_reward)}", "first and last step"))
        if eval_last is not None:
            one = eval_first is None
            value = number(eval_last) if one else f"{number(eval_first)} -> {number(eval_last)}"
            rows.append(("evaluation reward", value, "" if one else "first and last evaluation"))
        rows.append(("took", f"{seconds / 60:.1f} minutes", ""))
        rows.append(("run directory", str(run_dir), ""))
        if report is not None:
            rows.append(("report", str(report), ""))
        rows.append(("viewer", f"agentloop trace serve {run_dir}", ""))
        self._print("")
        for label, value, note in rows:
            line = Text.assemble((f"{label:<19}", "dim"), (clean(value), "bold"))
            line.append(f"   {note}" if note else "", style="dim")
            self._print(line)

    def interrupted(self, resume_command: str) -> None:
        """Print that the run was stopped, and the command that continues it."""
        self.close()
        self._print("")
        self._print(Text("Stopped. Continue with:", style="bold yellow"))
        self._print(Text(f"  {clean(resume_command)}"))

    def close(self) -> None:
        """Remove the bar and restore the terminal. May be called more than once."""
        self._progress = None
        self._stop_live()
        self._close_line()

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- drawing -----------------------------------------------------------------------------------

    @property
    def _width(self) -> int | None:
        """Columns of the terminal; None without a terminal: no limit."""
        return self._rich.width if self._terminal else None

    def _bar(self) -> RenderableType:
        """Return the current bottom line of the terminal."""
        if self._phase is not None:
            took = time.monotonic() - self._phase_began
            note = f"{self._phase_note}  " if self._phase_note else ""
            self._spinner.update(text=Text(f"{self._phase}  {note}{took:.0f}s", no_wrap=True, overflow="ellipsis"))
            return self._spinner
        done, total, label = self._progress or (0, 0, "")
        share = done / total if total else 0.0
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1, min_width=4)
        grid.add_column(no_wrap=True)
        if not self._total or label not in (EPISODES, TRAINING):
            grid.add_row(label, ProgressBar(total=1.0, completed=share), f"{done}/{total}")
            return grid
        counted = "training" if done >= total > 0 else f"{label} {done}/{total}" if total else label
        if label == TRAINING:  # the bar of the episodes stays full
            share = 1.0
        left = f"  {self._time_left(share)} left" if self._durations else ""
        grid.add_row(
            f"step {min(self._step + 1, self._total)}/{self._total}",
            ProgressBar(total=self._total, completed=min(self._total, self._step + share)),
            counted + left,
        )
        return grid

    def _time_left(self, share: float) -> str:
        left = max(0.0, (self._total - self._step - share) * sum(self._durations) / len(self._durations))
        return f"{left:.0f}s" if left < 60 else seconds(left)

    def _show_live(self) -> None:
        if self._live is None:
            self._live = Live(get_renderable=self._bar, console=self._rich, refresh_per_second=4, transient=True)
            self._live.start()
            atexit.register(self._stop_live)  # an unexpected error must not leave the cursor hidden

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            atexit.unregister(self._stop_live)

    def _close_line(self) -> None:
        if self._line_open:
            self._line_open = False
            self._rich.file.write("\n")
            self._rich.file.flush()

    def _print(self, line: str | Text) -> None:
        self._close_line()
        text = Text(line) if isinstance(line, str) else line
        if self._encoding is not None:
            text = Text(self._encodable(text.plain))
        self._rich.print(text, soft_wrap=not self._terminal)
        if not self._terminal:
            self._rich.file.flush()

    def _encodable(self, text: str) -> str:
        """Replace characters that the stream cannot encode: an ASCII log must not stop a run."""
        text = clean(text)
        if self._encoding is None:
            return text
        return text.replace("±", "+-").encode(self._encoding, "replace").decode(self._encoding)


def _is_terminal(stream: TextIO) -> bool:
    quiet = any(os.environ.get(name) for name in ("NO_COLOR", "CI")) or os.environ.get("TERM") == "dumb"
    return not quiet and stream.isatty()
