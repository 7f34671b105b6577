"""The viewer over 100,000 episodes: filter, sort and search them, open one of 64,000 tokens, and the server's memory.

    python benchmarks/trace_viewer.py [--folder DIR] [--no-browser] [--record | --quick]

Writes a run of 25 steps of 4,000 episodes (two turns, a tool call, about 200 words and 120 tokens each) and one
episode of 64,000 tokens through the store, serves it with `agentloop trace serve`, and asks. No question is asked
twice: the server keeps sorted results, and a repeated one would take no time at all. The result of each kind is the
median; the worst is printed beside it. In Chromium the times are of the page: from the action to the frame in which
the new rows are there, the browser's own work included. `--folder` keeps the run for the next time.

Exit code 1: a bound is not met (issue 16: 200 ms, 500 ms for opening, 1 s to the first paint, 500 MB).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from browser import Page, chromium, find_chromium
from quick import QUICK, add_quick_option, expect
from quiet import OtherLoad
from report import hardware, record

os.environ.setdefault("OMP_NUM_THREADS", "1")

REPO = Path(__file__).resolve().parents[1]
MODEL = REPO / "recipes" / "quickstart" / "model"

ASK_S, OPEN_S, PAINT_S, RSS_MB = 0.2, 0.5, 1.0, 500.0
STEPS, EPISODES, SAMPLES = 25, 4_000, 8
LONG_TOKENS, LONG_TURNS = 64_000, 100
WORDS = 20_000
REASONS = ("stop", "stop", "stop", "length", "max_turns")


@dataclass
class Material:
    """Words by falling frequency, and texts made of them."""

    words: list[str]
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    @classmethod
    def make(cls) -> Material:
        rng = np.random.default_rng(1)
        letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
        words = ["".join(rng.choice(letters, size)) for size in rng.integers(4, 11, WORDS)]
        made = cls(words)
        weights = list(accumulate(1 / (rank + 2) for rank in range(WORDS)))
        drawn = np.searchsorted(np.array(weights), made.rng.random(500_000) * weights[-1])
        made.pool = [words[i] for i in drawn]
        return made

    pool: list[str] = field(default_factory=list)

    def text(self, count: int) -> str:
        begin = int(self.rng.integers(0, len(self.pool) - count))
        return " ".join(self.pool[begin : begin + count])


def step_records(material: Material, step: int, episodes: int) -> Iterator[Any]:
    """Yield the records of a step, groups of eight."""
    from agentloop.columns import Logprobs, LossMask, TokenIds, Versions
    from agentloop.trace.record import TraceRecord
    from agentloop.types import EpisodeStatus, StopReason, ToolCall, Trajectory, Turn

    rng = material.rng
    mask = np.array([0] * 40 + [1] * 30 + [0] * 20 + [1] * 30, dtype=np.int8)
    sampled = mask == 1
    prompt = ""
    for number in range(episodes):
        if number % SAMPLES == 0:
            prompt = material.text(50)
        answers = [material.text(60), material.text(60)]
        call = {"expression": f"{number}*{step}", "note": material.text(3)}
        values = -rng.exponential(0.7, 60).astype(np.float32)
        logprobs, versions = Logprobs(), Versions()
        for begin in (0, 30):
            logprobs.extend_none((40, 20)[begin > 0])
            logprobs.extend(values[begin : begin + 30].tolist())
            versions.extend_run(None, (40, 20)[begin > 0])
            versions.extend_run(step - 1 - int(rng.integers(0, 2)), 30)
        failed = number % 97 == 0
        trainer = np.full(120, np.nan, np.float32)
        trainer[sampled] = values + rng.normal(0, 0.01, 60).astype(np.float32)
        trajectory = Trajectory(
            TokenIds(rng.integers(0, 500, 120).tolist()), LossMask(mask.tolist()), logprobs, versions, 40,
            turns=[
                Turn(40, 70, answers[0], StopReason.STOP, [ToolCall("calculator", call, "c0")], latency_s=0.5),
                Turn(90, 120, answers[1], StopReason.STOP, latency_s=0.5, order=1),
            ],
            reward=None if failed else round(float(rng.random()), 3), reward_parts={"correct": float(number % 2)},
            stop_reason=StopReason(REASONS[int(rng.integers(0, len(REASONS)))]),
            status=EpisodeStatus.FAILED if failed else EpisodeStatus.OK,
            error=f"ToolError: port {number} refused" if failed else None, answer=str(number), agent_name="tool_agent",
            task_id=f"task-{number // SAMPLES}", group_id=f"train/{step}/{number // SAMPLES}",
            sample_index=number % SAMPLES, data_source="bench", metrics={"generate_s": float(rng.random())},
            messages=[
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": answers[0], "tool_calls": [
                    {"type": "function", "id": "c0", "function": {"name": "calculator", "arguments": call}}]},
                {"role": "tool", "tool_call_id": "c0", "name": "calculator", "content": material.text(30)},
                {"role": "assistant", "content": answers[1]},
            ],
        )  # fmt: skip
        advantages = np.where(sampled, np.float32(0.1), np.float32(0))
        yield TraceRecord(step, "train", step - 1, 0, 1, trajectory, advantages, trainer, row=number // SAMPLES)


def long_record(material: Material, step: int, tokens: int, turns: int) -> Any:
    """One episode of many turns, each sampled, with the quickstart's vocabulary."""
    from agentloop.trace.record import TraceRecord
    from agentloop.types import StopReason, Trajectory, Turn

    size = tokens // turns
    mask = [int(i % size >= size // 4) for i in range(tokens)]
    values = -material.rng.exponential(0.7, tokens).astype(np.float32).astype(float)
    texts = [material.text(size // 3) for _ in range(turns)]
    messages: list[Any] = [{"role": "user", "content": material.text(50)}]
    for text in texts:
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": material.text(size // 8)}]
    spans = [(i * size + size // 4, (i + 1) * size) for i in range(turns)]
    trajectory = Trajectory(
        material.rng.integers(0, 500, tokens).tolist(),
        mask,
        [value if known else None for value, known in zip(values, mask, strict=True)],
        [step - 1 if known else None for known in mask],
        size // 4,
        turns=[Turn(*spans[i], texts[i], StopReason.STOP, latency_s=1.0, order=i) for i in range(turns)],
        reward=1.0,
        group_id="long",
        task_id="long",
        agent_name="tool_agent",
        messages=messages,
    )
    sampled = np.array(mask) == 1
    trainer = np.where(sampled, values + 0.01, np.nan).astype(np.float32)
    return TraceRecord(step, "train", step - 1, 0, 1, trajectory, sampled.astype(np.float32), trainer)


def make_run(run: Path, steps: int, episodes: int, long: tuple[int, int]) -> None:
    """Write the run, unless it is there."""
    import orjson

    from agentloop.trace.store import TraceStore

    done = run / "finished.json"
    if done.is_file():
        return
    begin = time.perf_counter()
    (run / "config").mkdir(parents=True, exist_ok=True)
    config = {"run": {"name": "bench", "steps": steps}, "model": {"path": str(MODEL)}}
    (run / "config" / "resolved.json").write_bytes(orjson.dumps(config))
    store, material = TraceStore(run), Material.make()
    with (run / "metrics.jsonl").open("wb") as file:
        for step in range(1, steps + 1):
            records = list(step_records(material, step, episodes))
            store.write(step, "train", [*records, long_record(material, step, *long)] if step == steps else records)
            file.write(orjson.dumps({"step": step, "reward/mean": 0.5, "step/time_s": 1.0}) + b"\n")
    size = sum(path.stat().st_size for path in run.rglob("*.parquet"))
    done.write_bytes(orjson.dumps({"steps": steps}))
    print(f"{steps * episodes + 1:,} episodes written: {size / 2**20:,.0f} MB, {time.perf_counter() - begin:.1f} s")


def make_index(run: Path) -> None:
    """Build the index as the run would have."""
    from agentloop.trace.index import TraceIndex

    index = TraceIndex(run)
    index.refresh()
    index.close()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The server in a process of its own: its address and its process."""
    command = [sys.executable, "-m", "agentloop", "trace", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("viewer: "):
                raise SystemExit(f"the server did not start: {line!r}")
            url = line.removeprefix("viewer: ").strip().rstrip("/")
            yield url, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(30)


def questions(words: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return requests for episodes by kind, each different from all others."""
    columns = ("reward", "length", "mismatch", "latency_s", "staleness", "turns", "status", "stop_reason", "task_id")
    return {
        "filter": [
            {"status": "failed"}, {"stop_reason": "length"}, {"min_reward": 0.25}, {"max_reward": 0.9, "step": "3-20"},
            {"step": "7"}, {"stop_reason": ["stop", "max_turns"]}, {"tool": "calculator"}, {"min_mismatch": 0.008},
            {"task_id": "task-17"}, {"cause": "ToolError: port # refused"}, {"min_latency_s": 0.5, "status": "ok"},
        ],
        "sort": [{"sort": sign + column} for column in columns for sign in ("", "-")],
        "search": [
            *({"q": f"{words[rank]} "} for rank in (0, 1, 5, 30, 200, 2_000, 15_000)),
            {"q": f"{words[2]} {words[3]} "}, {"q": f'"{words[0]} {words[1]}"'}, {"q": f"answer:{words[4]} "},
            {"q": f"{words[6]} -{words[7]} "}, {"q": "error:refused "}, {"q": words[100][:4]}, {"q": words[9][:3]},
            {"q": f"{words[8]} ", "status": "ok", "sort": "-reward"}, {"q": "calls:calculator "},
        ],
    }  # fmt: skip


class Notes:
    """A table of what was measured.

    Args:
        server: its CPU is counted too: on a busy machine, that and not the clock says what a request costs.
    """

    def __init__(self, server: psutil.Process) -> None:
        self._server = server
        self._cpu = self._seconds()
        self.missed: list[str] = []
        self.lines = [
            "| | asked | median ms | worst ms | bound | server CPU, mean ms |", "|---|---:|---:|---:|---:|---:|"
        ]  # fmt: skip

    def _seconds(self) -> float:
        times = self._server.cpu_times()
        return times.user + times.system

    def begin(self) -> None:
        """Count the server's CPU from here."""
        self._cpu = self._seconds()

    def __call__(self, label: str, times: Sequence[float], bound: float) -> None:
        """Note the median of some times, all since `begin` or the last note, beside its bound."""
        median, worst = statistics.median(times) * 1000, max(times) * 1000
        cpu = (self._seconds() - self._cpu) / len(times) * 1000
        self.lines.append(
            f"| {label} | {len(times)} | {median:,.0f} | {worst:,.0f} | {bound * 1000:,.0f} | {cpu:,.0f} |"
        )
        print(f"{label}: median {median:,.0f} ms, worst {worst:,.0f} ms (bound {bound * 1000:,.0f}), CPU {cpu:,.0f} ms")
        if median > bound * 1000:
            self.missed.append(label)
        self.begin()


def ask_server(url: str, words: Sequence[str], total: int, tokens: int, key: str, note: Notes) -> None:
    """Time the API."""
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as http:

        def get(path: str, **parameters: Any) -> tuple[Any, float]:
            begin = time.perf_counter()
            answer = http.get(f"/api/runs/bench{path}", params=parameters)
            seconds = time.perf_counter() - begin
            if answer.status_code != 200:
                raise SystemExit(f"{path} {parameters}: {answer.text[:300]}")
            return answer.json(), seconds

        while (first := get("/episodes", limit=0)[0])["indexing"]:
            time.sleep(0.5)
        expect("episodes", first["total"], total)
        note.begin()
        for kind, asked in questions(words).items():
            times = []
            for parameters in asked:
                answer, seconds = get("/episodes", limit=100, **parameters)
                expect(f"rows of {parameters}", len(answer["rows"]), min(100, answer["total"]))
                times.append(seconds)
            note(f"API: {kind}", times, ASK_S)
        episode, seconds = get("/episode", key=key)
        expect("tokens of the long episode", episode["length"], tokens)
        note("API: open an episode of 64,000 tokens", [seconds], OPEN_S)
        times = []
        for start in range(0, tokens, 16_384):
            part, seconds = get("/tokens", key=key, start=start, end=start + 16_384)
            expect("pieces", len(part["pieces"]), len(part["ids"]))
            times.append(seconds)
        note("API: 16,384 tokens of it", times, OPEN_S)


ROWS = "document.querySelectorAll('table.rows tr[data-index] a').length"
READY = f"({ROWS} > 0 && !document.querySelector('.scroll[aria-busy]'))"


def act(page: Page, action: str, done: str = READY) -> float:
    """Do something in the page; return the seconds until the frame in which it is done."""
    script = f"""new Promise(async (resolve, reject) => {{
        const frame = () => new Promise(requestAnimationFrame);
        const begin = performance.now();
        {action};
        await frame();
        while (!({done})) {{
            if (performance.now() - begin > 60000) return reject(new Error("not done in a minute"));
            await frame();
        }}
        resolve((performance.now() - begin) / 1000);
    }})"""
    return float(page.run(script, wait=True))


def ask_browser(url: str, words: Sequence[str], key: str, note: Notes) -> None:
    """Time the page in Chromium."""
    from urllib.parse import quote

    program = find_chromium()
    if program is None:
        print("no Chromium: the page was not measured")
        return
    search = "const field = document.querySelector('#search'); field.value = {!r}; " + (
        "field.dispatchEvent(new KeyboardEvent('keydown', {{key: 'Enter', bubbles: true}}))"
    )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, chromium(program, Path(profile)) as page:
        paints = []
        note.begin()
        for _ in range(3):
            page.open(f"{url}/#/run/bench/episodes")
            paint = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
            page.until(f"{paint} && {READY}")
            paints.append(page.run(paint) / 1000)
            page.open("about:blank")
        note("page: first paint of the table", paints, PAINT_S)
        page.open(f"{url}/#/run/bench/episodes")
        page.until(READY)
        sorts = [
            act(
                page,
                f"[...document.querySelectorAll('th button')].find(b => b.textContent.startsWith({name!r})).click()",
            )
            for name in ("Reward", "Tokens", "Mismatch", "Time", "Stale")
        ]
        note("page: sort", sorts, ASK_S)
        searches = [act(page, search.format(f"{words[rank]} ")) for rank in (11, 40, 300, 3_000, 13)]
        note("page: search", searches, ASK_S)
        act(page, search.format(""))
        ticks = [
            act(
                page,
                f"[...document.querySelectorAll('.facets input')].find(i => i.dataset.facet === {facet!r}).click()",
            )
            for facet in ("status=failed", "stop_reason=length", "stop_reason=stop")
        ]
        note("page: filter", ticks, ASK_S)
        here = f"#/run/bench/episode?key={quote(key, safe='')}"
        opened = act(page, f"location.hash = {here!r}", "document.querySelectorAll('.conversation .turn').length > 100")
        note("page: open an episode of 64,000 tokens", [opened], OPEN_S)
        act(page, "location.hash = '#/run/bench/episodes'")
        shown = act(
            page, f"location.hash = {here + '&view=tokens'!r}", "document.querySelector('.tokens-block.drawn i')"
        )
        note("page: its tokens", [shown], OPEN_S)


def main() -> int:
    """Measure; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, help="keep the run here and use it again")
    parser.add_argument("--no-browser", action="store_true", help="only the API")
    parser.add_argument("--record", action="store_true", help="write the table into benchmarks/RESULTS.md")
    add_quick_option(parser)
    arguments = parser.parse_args()

    steps, episodes, long = (2, 400, (1_600, 10)) if arguments.quick else (STEPS, EPISODES, (LONG_TOKENS, LONG_TURNS))
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="agentloop-viewer-"))
    try:
        run = folder / "bench"
        make_run(run, steps, episodes, long)
        begin, missing = time.process_time(), not (run / "traces" / "index.sqlite").is_file()
        make_index(run)
        made = f", {time.process_time() - begin:.0f} s of CPU to make it" if missing else ""
        megabytes = (run / "traces" / "index.sqlite").stat().st_size / 2**20
        facts = [f"Index: {megabytes:,.0f} MB{made}."]
        words, key = Material.make().words, f"train/{steps}/long/0/0"
        with serving(folder) as (url, process), OtherLoad() as others:
            note = Notes(process)
            ask_server(url, words, steps * episodes + 1, long[0], key, note)
            if not (arguments.no_browser or arguments.quick):
                ask_browser(url, words, key, note)
            rss = process.memory_info().rss / 1e6
        if others.cores is not None:
            facts.append(f"Meanwhile other programs took {others.cores:.1f} of {os.cpu_count()} cores.")
        missed = note.missed
        facts.append(f"Memory of the server after all of it: {rss:,.0f} MB (bound {RSS_MB:,.0f}).")
        print("\n".join(facts))
        if rss > RSS_MB:
            missed.append("memory of the server")
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder, ignore_errors=True)

    if arguments.quick:
        print(QUICK)
        return 0
    if missed:
        print("not met: " + ", ".join(missed))
    if arguments.record:
        command = "python benchmarks/trace_viewer.py --record"
        record(
            REPO / "benchmarks" / "RESULTS.md",
            command,
            ["\n".join([*note.lines, ""]), "\n".join([*facts, ""])],
            "trace_viewer.py",
            hardware(),
        )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
