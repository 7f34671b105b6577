"""CPU of spans: on the event loop while an episode runs, and in the process that sends them.

    python benchmarks/trace_spans.py [--quick]

The first figure is the bound that a command checks: at most 30 µs of the loop's CPU a span. The others say what the
run's sender process takes to read a step from its trace file, and `trace.otlp` from there until a receiver on this
machine, in another thread, has confirmed it. The run itself only names the file to that process.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from quick import QUICK, add_quick_option, expect

BOUND_US = 30.0
SPANS = 100
ROUNDS = 7


def record_one() -> tuple[float, list[Any]]:
    """An episode of turns, each of three spans, and tool calls; returns its CPU seconds and spans."""
    from agentloop.trace.spans import Recorder

    async def episode() -> tuple[float, list[Any]]:
        begin = time.thread_time()
        recorder = Recorder()
        with recorder:
            for number in range(SPANS // 4):
                with recorder.span("turn", None, request_id="g/0/1-abc"):
                    with recorder.span("generate", None, request_id="g/0/1-abc"):
                        pass
                    with recorder.span("parse"):
                        pass
                with recorder.span("tool", None, tool="calculator", call_id="call_0_0") as span:
                    span.set(score=0.5 * number)
        spans = recorder.finish()
        return time.thread_time() - begin, spans

    return asyncio.run(episode())


def made_records(count: int) -> list[Any]:
    """Records of one step: two turns and a call each, with a conversation of 2 KB."""
    from agentloop.trace.record import TraceRecord
    from agentloop.trace.spans import Recorder
    from agentloop.types import StopReason, Trajectory, Turn

    records = []
    for number in range(count):
        recorder = Recorder()
        with recorder:
            for turn in range(2):
                with recorder.span("turn", None, request_id=f"r{turn}"):
                    with recorder.span("generate", None, request_id=f"r{turn}"):
                        pass
                    with recorder.span("parse"):
                        pass
            with recorder.span("reward", None, reward="reward", score=1.0):
                pass
        text = "word " * 200
        trajectory = Trajectory(
            token_ids=[1] * 600,
            loss_mask=[0] * 200 + [1] * 400,
            logprobs=[None] * 200 + [-0.5] * 400,
            versions=[None] * 200 + [1] * 400,
            prompt_length=200,
            turns=[
                Turn(200, 400, text, StopReason.STOP, request_id="r0"),
                Turn(400, 600, text, StopReason.STOP, request_id="r1", order=1),
            ],
            messages=[
                {"role": "user", "content": "question " * 20},
                {"role": "assistant", "content": text},
                {"role": "user", "content": "again"},
                {"role": "assistant", "content": text},
            ],
            reward=1.0,
            agent_name="tool_agent",
            task_id=str(number),
            group_id=str(number // 8),
            sample_index=number % 8,
            trace_id=recorder.trace_id,
            spans=recorder.finish(),
        )
        records.append(TraceRecord(1, "train", 0, 0, 1, trajectory))
    return records


class Receiver:
    """A receiver of OTLP on this machine that confirms all it is sent.

    Attributes:
        size: bytes of the bodies of the requests so far.
    """

    def __init__(self) -> None:
        self.size = 0
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                receiver.size += len(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Receiver:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def sending(records: list[Any], folder: Path) -> tuple[float, float, int, int]:
    """CPU seconds of this thread for reading the records from their trace file and for sending them; spans, bytes of
    the requests."""
    from agentloop.config import OtlpConfig
    from agentloop.trace.backlog import Backlog
    from agentloop.trace.exporting import Destination, ExportRun
    from agentloop.trace.exports import ExportLog
    from agentloop.trace.otlp import OtlpExporter
    from agentloop.trace.store import TraceStore

    run = ExportRun("bench", folder, "model", 8)
    with Receiver() as receiver:
        config = OtlpConfig(endpoint=receiver.url)
        exporter = OtlpExporter(config, run)
        TraceStore(folder).write(1, "train", records)
        backlog = Backlog(Destination("otlp", exporter, config), run, ExportLog(folder / "traces"))
        (file,) = backlog.store.files()
        begin = time.thread_time()
        batches = list(backlog.batches(file, backlog.missing(file)))
        read = time.thread_time() - begin
        exporter.export(batches[0][:1])  # imports
        receiver.size = 0
        begin = time.thread_time()
        for batch in batches:
            exporter.export(batch)
        sent = time.thread_time() - begin
        exporter.close(1.0)
    return read, sent, sum(len(episode.spans) for batch in batches for episode in batch), receiver.size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_quick_option(parser)
    quick = parser.parse_args().quick
    rounds, episodes = (1, 16) if quick else (ROUNDS, 512)

    record_one()
    costs = []
    for _ in range(rounds):
        total = count = 0.0
        for _ in range(2 if quick else 50):
            seconds, spans = record_one()
            total, count = total + seconds, count + len(spans)
            expect("spans of an episode", len(spans), SPANS + 1)
        costs.append(1e6 * total / count)
    on_loop = statistics.median(costs)

    records = made_records(episodes)
    runs = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(sending(records, Path(folder)))
    read, sent = (statistics.median(run[i] for run in runs) for i in (0, 1))
    _, _, spans, size = runs[0]
    expect("spans sent", spans, 8 * episodes)

    print(f"on the event loop            {on_loop:6.1f} µs CPU a span (bound {BOUND_US:g} µs)")
    print(f"reading, in the sender       {1e6 * read / spans:6.1f} µs CPU a span")
    print(f"trace.otlp, in the sender    {1e6 * sent / spans:6.1f} µs CPU a span, {size / spans:.0f} bytes a span sent")
    if quick:
        print(QUICK)
    elif on_loop > BOUND_US:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
