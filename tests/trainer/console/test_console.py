"""What a run says: aligned, plain where it has to be, and never fooled by what a model wrote."""

from __future__ import annotations

import errno
import io
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from trainer.console.console import EPISODES, HEADER_EVERY, TRAINING, Console
from trainer.console.lines import bound_by
from trainer.console.samples import SAMPLE_LINES

METRICS = {
    "reward/mean": 0.3125,
    "reward/std": 0.46,
    "episode/tool_calls_mean": 0.364,
    "episode/response_tokens_mean": 38.2,
    "rollout/tokens_per_s": 11_432.0,
    "rollout/wait_s": 0.91,
    "train/tokens_per_s": 17_950.0,
    "train/wait_s": 0.42,
    "mismatch/logprob_abs_mean": 2.4e-7,
    "staleness/max": 1,
    "step/time_s": 1.62,
}


def plain() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(out, terminal=False), out


def said(act: Callable[[Console], Any]) -> str:
    console, out = plain()
    act(console)
    console.close()
    return out.getvalue()


def sample(*messages: tuple[str, str], **values: Any) -> dict[str, Any]:
    turns = [{"role": role, "content": content} for role, content in messages]
    return {"step": 3, "messages": turns, "reward": 1.0, **values}


def test_a_step_is_one_line_under_its_header() -> None:
    header, line = said(lambda c: c.step(METRICS | {"step": 12}, 60)).splitlines()
    titles = ["step", "reward", "tools", "tokens", "roll/s", "train/s", "mismatch", "stale", "time", "bound by"]
    assert re.split(r"\s{2,}", header.strip()) == titles
    assert line.split("  ")[0] == "12/60"
    for value in ("0.31 ± 0.46", "0.36", "38.2", "11.4k", "17.9k", "2.4e-7", "1.6s", "training (rollout idle 56%)"):
        assert value in line


@pytest.mark.parametrize(
    ("train_wait", "rollout_wait", "publish", "says"),
    [
        (1.3, 8.7, 0.1, "training (rollout idle 87%)"),  # the trainer is slow, though the rollout waits longest
        (6.0, 0.2, 0.1, "rollout (training idle 60%)"),
        (1.0, 8.0, 8.0, "publishing (rollout idle 80%)"),
        (0.2, 0.3, 0.1, "both"),
        (None, 0.3, 0.1, "–"),
        (0.0, 30.0, 0.0, "training (rollout idle 100%)"),
    ],
)
def test_a_step_names_what_it_was_bound_by(
    train_wait: float | None, rollout_wait: float, publish: float, says: str
) -> None:
    metrics = {
        "step/time_s": 10.0,
        "train/time_s": 5.0,
        "publish/time_s": publish,
        "train/wait_s": train_wait,
        "rollout/wait_s": rollout_wait,
    }
    assert bound_by(metrics) == says
    assert bound_by(metrics, idle=False) == says.partition(" ")[0]


def test_a_sample_names_its_row() -> None:
    lines = said(lambda c: c.samples([sample(("user", "a"), task_id="165", stop_reason="stop")])).splitlines()
    assert lines[1] == "sample   step 3   row 165   reward 1   stop"
    lines = said(lambda c: c.samples([sample(("user", "a"), task_id=0)])).splitlines()
    assert lines[1] == "sample   step 3   row 0   reward 1"


def test_columns_are_aligned_whatever_the_numbers() -> None:
    def act(console: Console) -> None:
        console.step(METRICS | {"step": 1}, 100)
        console.step(METRICS | {"step": 100, "mismatch/logprob_abs_mean": None, "reward/std": float("nan")}, 100)
        console.step({"step": 7, "reward/mean": -123.4}, 100)

    header, *lines = said(act).splitlines()
    edge = header.index("time") + len("time")
    assert [line[:edge].endswith("1.6s") for line in lines] == [True, True, False]
    assert [line[edge:].startswith("  training (") for line in lines] == [True, True, False]
    assert lines[2].startswith("  7/100") and "-123" in lines[2] and lines[2].endswith("–")


def test_the_header_comes_again() -> None:
    def act(console: Console) -> None:
        for step in range(1, 2 * HEADER_EVERY + 2):
            console.step(METRICS | {"step": step}, 50)

    lines = said(act).splitlines()
    assert [i for i, line in enumerate(lines) if "mismatch" in line] == [0, HEADER_EVERY + 1, 2 * (HEADER_EVERY + 1)]


def test_phases_are_named_with_their_seconds_and_failures_are_said() -> None:
    def act(console: Console) -> None:
        with console.phase("check data"):
            pass
        with pytest.raises(ValueError, match="no"), console.phase("load model"):
            console.warn("slow disk")
            raise ValueError("no")

    first, second, third, fourth = said(act).splitlines()
    assert re.fullmatch(r"check data \.\.\. \d\.\d\ds", first)
    assert (second, third) == ("load model ... ", "warning: slow disk")
    assert re.fullmatch(r"load model \.\.\. failed after \d\.\d\ds", fourth)


def test_samples_show_question_model_tool_and_reward() -> None:
    shown = sample(
        ("system", "Be brief."), ("user", "What is 6 * 7?"), ("assistant", ""), ("tool", "42"), ("assistant", "#### 42")
    )
    shown["messages"][2]["tool_calls"] = [{"type": "function", "function": {"name": "calculator", "arguments": {"expression": "6 * 7"}}}]  # fmt: skip  # noqa: E501
    lines = [line.strip() for line in said(lambda c: c.samples([shown | {"expected": "42"}])).splitlines() if line]
    assert lines[0] == "sample   step 3   reward 1"
    assert [re.split(r"\s{2,}", line) for line in lines[1:]] == [
        ["question", "What is 6 * 7?"],
        ["calls", 'calculator({"expression": "6 * 7"})'],
        ["tool", "42"],
        ["model", "#### 42"],
        ["expected", "42"],
    ]


def test_markup_escapes_and_surrogates_of_a_model_are_shown_not_obeyed() -> None:
    hostile = "[bold red]x[/] [link=http://x]y \x1b[2J\x1b]0;title\x07 \ud800 :smile: \u202e"
    text = said(
        lambda c: c.samples([sample(("user", hostile), ("assistant", hostile), task_id=hostile, error=hostile)])
    )
    assert "[bold red]x[/]" in text and ":smile:" in text and "␛[2J" in text
    assert not set(text) & {"\x1b", "\x07", "\ud800", "\u202e"}
    for act in (lambda c: c.warn(hostile), lambda c: c.notice(hostile), lambda c: c.interrupted(hostile)):
        assert "[bold red]x[/]" in said(act) and "\x1b" not in said(act)


def test_a_call_that_could_not_be_read_is_shown_in_place_of_an_empty_turn() -> None:
    shown = sample(("user", "q"), ("assistant", ""), malformed_calls={1: ['{"name":\x1bcalc' + "y" * 400]})
    lines = [line.strip() for line in said(lambda c: c.samples([shown])).splitlines() if line.strip()]
    assert lines[2].startswith('malformed {"name":␛calcyyy') and lines[-1].endswith("y…")
    assert not any(line.startswith("model") for line in lines)


def test_long_samples_are_cut_and_wrapped() -> None:
    text = said(lambda c: c.samples([sample(("user", "q"), ("assistant", "漢字🧮 " * 2000))]))
    assert "more lines" in text
    assert len(text.splitlines()) < SAMPLE_LINES + 8
    assert max(cell_len(line) for line in text.splitlines()) <= 100


def test_images_and_missing_fields_in_samples_are_no_error() -> None:
    image = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}
    text = said(lambda c: c.samples([{"step": 1, "messages": [image], "reward": None}, {"reward": float("nan")}]))
    assert "[image] what is it?" in text and "reward –" in text


def test_an_evaluation_is_set_against_the_first() -> None:
    def act(console: Console) -> None:
        console.eval({"step": 0, "eval/reward_mean": 0.0625, "eval/episodes": 256, "eval/failed": 0})
        console.eval({"step": 20, "eval/reward_mean": 0.5, "eval/episodes": 256, "eval/failed": 3, "eval/time_s": 1.25})
        console.eval({"step": 40, "eval/reward_mean": None, "eval/tool_calls_mean": 2.0, "eval/tool_errors_mean": 1.5})

    first, second, third = said(act).splitlines()
    assert first == "eval  step 0  reward 0.062  256 episodes"
    assert second == "eval  step 20  reward 0.500 (first 0.062)  256 episodes  3 failed  1.2s"
    assert third.startswith("eval  step 40  reward –") and third.endswith("2 tools  1.50 tool errors")


def test_the_summary_names_rewards_time_and_places() -> None:
    def act(console: Console) -> None:
        console.eval({"step": 0, "eval/reward_mean": 0.05})
        console.eval({"step": 60, "eval/reward_mean": 0.975})
        console.summary(run_dir=Path("/r/[x]"), report=Path("/r/[x]/report.html"), first_reward=0.3, last_reward=0.94,
                        eval_first=0.05, eval_last=0.975, seconds=205.0)  # fmt: skip

    text = said(act)
    for part in (
        "0.300 -> 0.940",
        "0.050 -> 0.975",
        "3.4 minutes",
        "/r/[x]/report.html",
        "agentloop trace serve /r/[x]",
    ):
        assert part in text


def test_the_line_that_resumes_is_printed_whole() -> None:
    command = (
        "agentloop train --config recipe.yaml " + " ".join(f"key.number_{i}=value" for i in range(20)) + " --resume"
    )
    assert command in said(lambda c: c.interrupted(command)).splitlines()[-1]


def test_a_stream_of_ascii_is_no_reason_to_stop() -> None:
    raw = io.BytesIO()
    console = Console(io.TextIOWrapper(raw, encoding="ascii"), terminal=False)
    with console.phase("prüfen"):
        pass
    console.step(METRICS | {"step": 1}, 60)
    console.samples([sample(("user", "🧮"), ("assistant", "é"))])
    console.close()
    assert b"0.31 +- 0.46" in raw.getvalue()


@pytest.mark.parametrize("name", ["NO_COLOR", "CI"])
def test_no_color_and_ci_make_a_terminal_plain(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(name, "1")
    out = Terminal()
    console = Console(out)
    with console.phase("x"):
        console.progress(1, 2, "episodes")
    console.step(METRICS | {"step": 1}, 2)
    console.close()
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue()


SCRIPT = """
import sys, time
from trainer.console.console import Console
metrics = %r
console = Console()
with console.phase("load model"):
    pass
for step in (1, 2):
    for done in range(257):
        console.progress(done, 256, "episodes")
    time.sleep(0.3)
    console.step(metrics | {"step": step}, 3)
console.warn("half a step")
if "crash" in sys.argv:
    raise RuntimeError("boom")
console.close()
print("after")
"""


def in_terminal(*arguments: str, columns: int = 80) -> str:
    """What the script writes to a pseudo terminal."""
    leader, follower = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "CI", "LINES")}
    environment |= {"TERM": "xterm-256color", "COLUMNS": str(columns), "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT % METRICS, *arguments], stdout=follower, stderr=follower, env=environment,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    os.close(follower)
    out = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # Linux says EIO when the last writer has closed its end
            break
        if not part:
            break
        out += part
    process.wait(timeout=60)
    os.close(leader)
    return out.decode()


@pytest.mark.parametrize("columns", [80, 50])
def test_a_terminal_gets_a_bar_that_is_gone_at_the_end_and_lines_that_fit(columns: int) -> None:
    out = in_terminal(columns=columns)
    assert "━" in out and "left" in out and "step 2/3" in out
    assert out.index("\x1b[?25l") < out.rindex("\x1b[?25h")  # the cursor is given back
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).split("\r")[-1] for line in out.split("\r\n")]
    assert any("0.31 ± 0.46" in line for line in lines)
    assert max(cell_len(line) for line in lines) <= columns
    assert "after" in lines[-2] and "━" not in lines[-2]


def test_a_crash_gives_the_cursor_back() -> None:
    out = in_terminal("crash")
    assert "boom" in out
    assert out.rindex("\x1b[?25l") < out.rindex("\x1b[?25h")


def test_an_evaluation_of_several_samples_a_row_says_more_than_their_mean() -> None:
    numbers = {"eval/pass@1": 0.25, "eval/pass@4": 0.5, "eval/maj@4": 0.375, "eval/math/pass@4": 0.7}
    line = said(lambda c: c.eval({"step": 20, "eval/reward_mean": 0.25, **numbers, "eval/episodes": 64}))
    assert line == "eval  step 20  reward 0.250  pass@4 0.500  maj@4 0.375  64 episodes\n"


def test_without_a_bar_long_work_says_now_and_then_how_far_it_is() -> None:
    out = io.StringIO()
    console = Console(out, terminal=False, report_every_s=0)
    with console.phase("check rows"):
        for done in (1, 20_000, 50_000):
            console.phase_progress(done, 50_000)
    assert out.getvalue().startswith("check rows ... 1/50,000 ... 20,000/50,000 ... 50,000/50,000 ... ")
    out.truncate(out.seek(0))
    for done in (1, 600, 1_000):
        console.progress(done, 1_000, "evaluation")
        console.progress(done, 1_000, EPISODES)
    for done in (3, 8):
        console.progress(done, 8, TRAINING)
    assert out.getvalue() == "evaluation 600/1,000\nstep 1: episodes 600/1,000\nstep 1: trained groups 3/8\n"
    quiet, silent = plain()
    with quiet.phase("check rows"):
        quiet.phase_progress(1, 2)
    for label in ("evaluation", EPISODES, TRAINING):
        quiet.progress(1, 2, label)
    assert "1/2" not in silent.getvalue(), "short work says nothing"


def test_output_that_nobody_reads_any_more_does_not_end_the_run() -> None:
    class Closed(io.StringIO):
        written = 0

        def write(self, text: str) -> int:
            self.written += 1
            if self.written > 1:
                raise OSError(errno.EIO, "Input/output error")
            return super().write(text)

    stream = Closed()
    console = Console(stream, terminal=False)
    for number in range(3):
        console.notice(f"line {number}")
    with console.phase("save"):
        pass
    console.interrupted("agentloop train --resume")
    assert "line 0" in stream.getvalue() and "line 2" not in stream.getvalue()


def test_after_a_resume_evaluations_are_compared_with_the_first_of_the_run() -> None:
    console, out = plain()
    console.resumed(2, 0.25)
    console.eval({"step": 8, "eval/reward_mean": 0.75})
    assert "(first 0.250)" in out.getvalue()


def test_after_a_resume_steps_are_counted_on() -> None:
    out = io.StringIO()
    console = Console(out, terminal=False, report_every_s=0)
    console.resumed(2, None)
    for done in (1, 3):
        console.progress(done, 8, EPISODES)
    assert out.getvalue() == "step 3: episodes 3/8\n"
