"""What a run says while it runs: named phases, one aligned line a step, samples, and how it ended.

On a terminal there is a progress bar at the bottom and some colour. Anywhere else (a pipe, a file, CI, NO_COLOR) the
same lines are plain text without a single control code, so that they can be grepped and kept.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from agentloop.text import clean, finite, number, seconds
from agentloop.types import Message

HEADER_EVERY = 20
"""Steps between two header lines."""

PLAIN_WIDTH = 100
"""Columns to which samples are wrapped when the output is not a terminal."""

ETA_STEPS = 20
"""The time that is left is estimated from so many steps."""

SAID_EVERY_S = 10.0
"""Seconds between two words on how far a phase is, or an evaluation, where there is no bar to watch."""

SAMPLE_LINES = 14
"""Lines of one message in a sample; more are counted, not printed."""

LABEL_WIDTH = 10

LABELS = {
    "question": ("question", "none"),
    "assistant": ("model", "cyan"),
    "calls": ("calls", "bold cyan"),
    "tool": ("tool", "yellow"),
    "user": ("user", "yellow"),
    "expected": ("expected", "dim"),
}
"""How a sample names who speaks, and in which colour."""

Metrics = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the step lines. Columns with a larger `keep` go first when the terminal is too narrow."""

    title: str
    width: int
    style: str
    keep: int


COLUMNS = (
    Column("step", 5, "bold", 0),
    Column("reward", 11, "bold green", 0),
    Column("tools", 5, "", 2),
    Column("tokens", 6, "", 3),
    Column("roll/s", 6, "cyan", 4),
    Column("train/s", 7, "cyan", 4),
    Column("mismatch", 8, "", 1),
    Column("stale", 5, "", 5),
    Column("time", 6, "", 1),
    Column("waited", 12, "dim", 6),
)
"""tools: calls an episode; tokens: response tokens; roll/s, train/s: tokens a second; waited: who waited for whom."""


class Console:
    """The run's voice. All text may be untrusted; none of it is read as markup.

    Args:
        file: where to write; null: standard output.
        terminal: whether to draw a progress bar and colours; null: found out.
        said_every_s: seconds between two words on progress where there is no bar.
    """

    def __init__(
        self, file: TextIO | None = None, *, terminal: bool | None = None, said_every_s: float = SAID_EVERY_S
    ) -> None:
        stream = file or sys.stdout
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
        self._said_every_s = said_every_s
        self._said = 0.0
        self._said_of = ""
        self._line_open = False
        self._lines_since_header: int | None = None
        self._progress: tuple[int, int, str] | None = None
        self._step = 0
        self._total = 0
        self._durations: list[float] = []
        self._first_eval: float | None = None
        self._evals = 0
        self._spinner = Spinner("dots")

    # -- set-up -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name a stretch of set-up work and say how long it took, or that it failed."""
        begin = time.monotonic()
        outer, self._phase, self._phase_began = (self._phase, self._phase_began), name, begin
        self._phase_note, self._said = "", begin
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
        """Say how far the present phase is. Cheap: nothing is drawn here, and where there is no bar little is said."""
        self._phase_note = f"{done:,}/{total:,}"
        if not self._terminal and self._line_open and time.monotonic() - self._said >= self._said_every_s:
            self._said = time.monotonic()
            self._rich.file.write(f"{self._phase_note} ... ")
            self._rich.file.flush()

    # -- the steps ----------------------------------------------------------------------------------------------------

    def progress(self, done: int, total: int, label: str) -> None:
        """Say how far a step's episodes, or an evaluation, are. Cheap: the bar is drawn four times a second."""
        self._progress = (done, total, label)
        if self._terminal and self._live is None:
            self._show_live()
        if not self._terminal and label != "episodes":
            now = time.monotonic()
            if self._said_of != label:
                self._said_of, self._said = label, now
            elif done < total and now - self._said >= self._said_every_s:
                self._said = now
                self._print(f"{label} {done:,}/{total:,}")
            if done >= total:
                self._said_of = ""

    def step(self, metrics: Metrics, total_steps: int) -> None:
        """Print the line of a finished step. Keys are those of DESIGN section 6; any may be missing."""
        self._step, self._total = int(finite(metrics.get("step")) or 0), total_steps
        duration = finite(metrics.get("step/time_s"))
        if duration is not None:
            self._durations = [*self._durations[1 - ETA_STEPS :], duration]
        self._progress = (0, 0, "episodes") if self._step < total_steps else None
        if self._progress is None:
            self._stop_live()
        elif self._terminal:
            self._show_live()
        columns, gap = self._columns(total_steps)
        if self._lines_since_header is None or self._lines_since_header >= HEADER_EVERY:
            self._print(Text(gap.join(_fit(column.title, column) for column in columns).rstrip(), style="dim"))
            self._lines_since_header = 0
        self._lines_since_header += 1
        cells = self._cells(metrics, total_steps)
        line = Text()
        for index, column in enumerate(columns):
            line.append(gap if index else "")
            line.append(_fit(cells[column.title], column), style=column.style)
        line.rstrip()
        self._print(line)

    def eval(self, metrics: Metrics) -> None:
        """Print the line of an evaluation; later ones are set against the first."""
        reward = finite(metrics.get("eval/reward_mean"))
        self._evals += 1
        if self._first_eval is None:
            self._first_eval = reward
        line = Text.assemble(("eval", "bold magenta"), f"  step {int(finite(metrics.get('step')) or 0)}  reward ")
        line.append(number(reward), style="bold magenta")
        if self._evals > 1 and self._first_eval is not None:
            line.append(f" (first {number(self._first_eval)})")
        facts = ""
        for key, value in metrics.items():  # of a data source's own there may be many
            if "@" in key and key.count("/") == 1 and not key.endswith("@1"):
                facts += f"  {key.removeprefix('eval/')} {number(finite(value))}"
        for key, label in (("tool_calls_mean", "tools"), ("episodes", "episodes"), ("failed", "failed")):
            value = finite(metrics.get(f"eval/{key}"))
            if value is not None and (value or key != "failed"):
                facts += f"  {number(value)} {label}"
        if (took := finite(metrics.get("eval/time_s"))) is not None:
            facts += f"  {seconds(took)}"
        line.append(facts, style="dim")
        self._progress = None if self._step in (0, self._total) else (0, 0, "episodes")
        if self._progress is None:
            self._stop_live()
        self._print(line)

    def samples(self, samples: Sequence[dict[str, Any]]) -> None:
        """Print decoded episodes: the question, who said what, the reward.

        Args:
            samples: each with `step`, `messages` (`Trajectory.messages`) and `reward`; and, where they are known,
                `task_id`, `stop_reason`, `error` and `expected`, the right answer.
        """
        for sample in samples:
            self._print("")
            for line in self._sample_lines(sample):
                self._print(line)
        if samples:
            self._print("")
            self._lines_since_header = None  # the samples have parted the step lines from their header

    # -- words --------------------------------------------------------------------------------------------------------

    def notice(self, text: str) -> None:
        """Say something that is no cause for worry."""
        self._print(Text(clean(text)))

    def warn(self, text: str) -> None:
        """Say something that the user should look at."""
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
        """Say how the run ended and where everything is."""
        self.close()
        rows: list[tuple[str, str, str]] = []
        if first_reward is not None or last_reward is not None:
            rows.append(("training reward", f"{number(first_reward)} -> {number(last_reward)}", "first and last step"))
        if eval_last is not None:
            one = eval_first is None or self._evals == 1
            value = number(eval_last) if one else f"{number(eval_first)} -> {number(eval_last)}"
            rows.append(("evaluation reward", value, "" if one else "first and last evaluation"))
        rows.append(("took", f"{seconds / 60:.1f} minutes", ""))
        rows.append(("run directory", str(run_dir), ""))
        if report is not None:
            rows.append(("report", str(report), ""))
        self._print("")
        for label, value, note in rows:
            line = Text.assemble((f"{label:<19}", "dim"), (clean(value), "bold"))
            line.append(f"   {note}" if note else "", style="dim")
            self._print(line)

    def interrupted(self, resume_command: str) -> None:
        """Say that the run was stopped, and the line that goes on with it."""
        self.close()
        self._print("")
        self._print(Text("Stopped. Continue with:", style="bold yellow"))
        self._print(Text(f"  {clean(resume_command)}"))

    def close(self) -> None:
        """Take the bar away and give the terminal back. May be called more than once."""
        self._progress = None
        self._stop_live()
        self._close_line()

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- how it is drawn ----------------------------------------------------------------------------------------------

    def _columns(self, total_steps: int) -> tuple[list[Column], str]:
        """The columns that fit, and what stands between them."""
        step_width = max(5, 2 * len(str(total_steps)) + 1)
        columns = [replace(column, width=step_width) if column.title == "step" else column for column in COLUMNS]
        if not self._terminal:
            return columns, "  "
        while len(columns) > 2 and _width(columns, 1) > self._rich.width:
            columns.remove(max(columns, key=lambda column: column.keep))
        return columns, "  " if _width(columns, 2) <= self._rich.width else " "

    def _cells(self, metrics: Metrics, total_steps: int) -> dict[str, str]:
        def get(key: str) -> float | None:
            return finite(metrics.get(key))

        reward, std = get("reward/mean"), get("reward/std")
        return {
            "step": f"{self._step}/{total_steps}",
            "reward": _two(reward) + (f" ± {_two(std)}" if std is not None else ""),
            "tools": _two(get("episode/tool_calls_mean")),
            "tokens": number(get("episode/response_tokens_mean")),
            "roll/s": number(get("rollout/tokens_per_s")),
            "train/s": number(get("train/tokens_per_s")),
            "mismatch": number(get("mismatch/logprob_abs_mean")),
            "stale": number(get("staleness/max")),
            "time": seconds(get("step/time_s")),
            "waited": _waited(
                get("train/wait_s"), get("rollout/wait_s"), both=_has_room(self._terminal, self._rich.width)
            ),
        }

    def _sample_lines(self, sample: dict[str, Any]) -> Iterator[Text]:
        reward = finite(sample.get("reward"))
        title = Text.assemble(("sample", "bold"), f"   step {clean(sample.get('step', '?'), 12)}   reward ")
        title.append(number(reward), style="bold green" if reward else "bold red")
        for key in ("task_id", "stop_reason", "error"):
            title.append(f"   {clean(sample[key], 200)}" if sample.get(key) else "", style="dim")
        yield title
        parts = list(_conversation(sample.get("messages") or []))
        if sample.get("expected") is not None:
            parts.append(("expected", sample["expected"]))
        width = max(20, (min(self._rich.width, 120) if self._terminal else PLAIN_WIDTH) - LABEL_WIDTH - 4)
        for kind, text in parts:
            label, style = LABELS.get(kind, (clean(kind, LABEL_WIDTH - 1), "yellow"))
            lines = list(Text(clean(text).strip("\n").expandtabs(4)).wrap(self._rich, width, overflow="fold"))
            for index, line in enumerate(lines[:SAMPLE_LINES] or [Text()]):
                line.rstrip()
                line.stylize(style)
                yield Text.assemble("  ", (f"{label if not index else '':<{LABEL_WIDTH}}", f"bold {style}"), line)
            if len(lines) > SAMPLE_LINES:
                yield Text(" " * (LABEL_WIDTH + 2) + f"… {len(lines) - SAMPLE_LINES} more lines", style="dim")

    def _bar(self) -> RenderableType:
        """What stands at the bottom of the terminal just now."""
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
        if not self._total or label != "episodes":
            grid.add_row(label, ProgressBar(total=1.0, completed=share), f"{done}/{total}")
            return grid
        counted = "training" if done >= total > 0 else f"{label} {done}/{total}" if total else label
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
            atexit.register(self._stop_live)  # an error that nobody expected must not leave the cursor hidden

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
        """`text` as far as the stream's encoding has it; a log in ASCII is no reason to stop a run."""
        text = clean(text)
        return (
            text
            if self._encoding is None
            else text.replace("±", "+-").encode(self._encoding, "replace").decode(self._encoding)
        )


def _conversation(messages: Sequence[Message]) -> Iterator[tuple[str, str]]:
    """Who said what, from the question on: the last message before the model's first."""
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    for index, message in enumerate(messages[max(0, first - 1) :], start=max(0, first - 1)):
        role = message["role"]
        text = _content(message)
        calls = message.get("tool_calls") or []
        if text or not calls:
            yield "question" if index < first else role, text
        for call in calls:
            function = call["function"]
            yield "calls", f"{function['name']}({json.dumps(function['arguments'], ensure_ascii=False, default=str)})"


def _content(message: Message) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return " ".join(str(part.get("text", f"[{part.get('type', 'part')}]")) for part in content or [])


def _is_terminal(stream: TextIO) -> bool:
    quiet = any(os.environ.get(name) for name in ("NO_COLOR", "CI")) or os.environ.get("TERM") == "dumb"
    return not quiet and stream.isatty()


def _fit(text: str, column: Column) -> str:
    return f"{text:<{column.width}}" if column.title == "waited" else f"{text:>{column.width}}"


def _width(columns: Sequence[Column], gap: int) -> int:
    return sum(column.width for column in columns) + gap * (len(columns) - 1)


def _has_room(terminal: bool, width: int) -> bool:
    return not terminal or width >= _width(COLUMNS, 2) + 16


def _two(value: float | None) -> str:
    """Two decimals for the size that rewards usually have."""
    return f"{value:.2f}" if value is not None and abs(value) < 10 else number(value)


def _waited(train: float | None, rollout: float | None, *, both: bool) -> str:
    """`train 0.4s`: the trainer waited so long for episodes; `rollout 0.9s`: the engine was idle so long."""
    waits = [
        (wait, name) for wait, name in ((train, "train"), (rollout, "rollout")) if wait is not None and wait >= 0.05
    ]
    if not both:
        waits = [max(waits)] if waits else []
    return ", ".join(f"{name} {wait:.1f}s" if wait < 10 else f"{name} {wait:.0f}s" for wait, name in waits) or "–"
