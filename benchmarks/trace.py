"""The store of traces beside the JSON lines that it replaced: bytes a token, tokens a second, to write and to read.

    python benchmarks/trace.py [--quick] [--folder DIR]

Both write the same trajectories from one thread, in turn. The JSON writer is the former one, kept here as the peer:
one `Trajectory.to_json()` a line. Ends with exit code 1 over 10 bytes or under 2 M tokens a second: `random ids` is the
worst case (nothing repeats), `text` has prompts shared by a group and trainer logprobs. Also prints how long the
longest pause of an event loop is while a step is written in a thread.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from quick import QUICK, add_quick_option, expect

os.environ.setdefault("OMP_NUM_THREADS", "1")

BYTES_A_TOKEN, TOKENS_A_SECOND = 10.0, 2e6
VOCABULARY = 151_643
ROUNDS = 3


def trajectories(groups: int, samples: int, tokens: int, *, random_ids: bool, seed: int = 0) -> list:
    """Trace records of one step: `groups` x `samples` episodes of about `tokens` tokens in 8 turns."""
    from agentloop.columns import Logprobs, LossMask, TokenIds, Versions
    from agentloop.trace.record import TraceRecord
    from agentloop.types import StopReason, ToolCall, Trajectory, Turn

    rng = np.random.default_rng(seed)
    words = rng.zipf(1.3, size=1 << 20) % VOCABULARY
    records = []
    for group in range(groups):
        prompt = rng.integers(0, VOCABULARY, tokens // 4)
        for sample in range(samples):
            ids, mask, logprobs, versions = TokenIds(), LossMask(), Logprobs(), Versions()
            own = rng.integers(0, VOCABULARY, tokens // 4) if random_ids else prompt
            ids.extend(own.tolist())
            mask.extend(0, len(own))
            logprobs.extend_none(len(own))
            versions.extend_run(None, len(own))
            turns, messages = [], [{"role": "user", "content": "question " * 40}]
            for turn in range(8):
                size, output = tokens * 3 // 40, tokens * 3 // 160
                start = len(ids)
                sampled = rng.integers(0, VOCABULARY, size) if random_ids else rng.choice(words, size)
                values = -rng.exponential(0.7, size).astype(np.float32).astype(float)
                ids.extend(sampled.tolist())
                mask.extend(1, size)
                logprobs.extend(values.tolist())
                versions.extend_run(6 + turn // 4, size)
                call = ToolCall("search", {"query": f"{group} {sample} {turn}"}, id=f"call_{turn}")
                text = " ".join(map(str, sampled[: size // 2]))
                turns.append(Turn(start, len(ids), text, StopReason.STOP, [call], request_id=f"r{turn}", order=turn))
                messages += [
                    {"role": "assistant", "content": text},
                    {"role": "tool", "content": text[: len(text) // 4]},
                ]
                if turn < 7:
                    ids.extend(rng.choice(words, output).tolist())
                    mask.extend(0, output)
                    logprobs.extend_none(output)
                    versions.extend_run(None, output)
            trajectory = Trajectory(
                ids, mask, logprobs, versions, len(own), turns=turns, reward=float(rng.random() < 0.5),
                agent_name="tool_agent", task_id=f"row {group}", group_id=f"g{group}", sample_index=sample,
                messages=messages, metrics={"tool_calls": 8.0},
            )  # fmt: skip
            record = TraceRecord(7, "train", 6, 0, 1, trajectory, row=group)
            if not random_ids:
                array = np.asarray(mask, dtype=bool)
                record.advantages = np.where(array, np.float32(rng.normal()), 0).astype(np.float32)
                noise = rng.normal(0, 1e-3, len(ids))
                record.trainer_logprobs = (np.asarray(logprobs) + noise).astype(np.float32)
            records.append(record)
    return records


def write_json_lines(path: Path, records: Sequence) -> None:
    """The former writer: one trajectory a line."""
    from agentloop.files import json_line, write_atomic

    lines = b"".join(json_line(record.trajectory.to_json()) for record in records)
    write_atomic(path, lines, durable=False)


def read_json_lines(path: Path) -> int:
    """The former reader; returns the tokens."""
    from agentloop.types import Trajectory

    with path.open("rb") as file:
        return sum(len(Trajectory.from_json(json.loads(line))) for line in file)


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process during `work`, of all its threads."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


async def longest_pause(work: Callable[[], object]) -> float:
    """The longest time in which an event loop could not run while `work` ran in a thread."""
    longest, done = 0.0, asyncio.create_task(asyncio.to_thread(work))
    last = time.perf_counter()
    while not done.done():
        await asyncio.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    await done
    return longest


def measure(name: str, records: list, folder: Path, *, quick: bool) -> bool:
    """Print one workload's numbers; return whether they are within the bounds."""
    from agentloop.trace.store import TraceStore

    store, old = TraceStore(folder / name), folder / f"{name}.jsonl"
    path = store.path(7, "train")
    tokens = sum(len(record.trajectory) for record in records)
    sampled = sum(record.trajectory.sampled_tokens for record in records)
    print(f"{name}: {len(records)} trajectories of {tokens // len(records):,} tokens, {sampled / tokens:.0%} sampled")

    rounds = 1 if quick else ROUNDS
    ours = [cpu_seconds(lambda: store.write(7, "train", records)) for _ in range(rounds)]
    theirs = [cpu_seconds(lambda: write_json_lines(old, records)) for _ in range(rounds)]
    read_ours = cpu_seconds(lambda: expect("tokens", sum(len(r.trajectory) for r in store.records(7, "train")), tokens))
    read_theirs = cpu_seconds(lambda: expect("tokens", read_json_lines(old), tokens))
    pause = asyncio.run(longest_pause(lambda: store.write(7, "train", records)))

    size, old_size = path.stat().st_size / tokens, old.stat().st_size / tokens
    rate, old_rate = tokens / statistics.median(ours), tokens / statistics.median(theirs)
    print(f"  {'':12} {'bytes a token':>14} {'written a CPU s':>16} {'read a CPU s':>14}")
    print(f"  {'parquet':12} {size:14.2f} {rate / 1e6:14.2f} M {tokens / read_ours / 1e6:12.2f} M")
    print(f"  {'JSON lines':12} {old_size:14.2f} {old_rate / 1e6:14.2f} M {tokens / read_theirs / 1e6:12.2f} M")
    print(f"  longest pause of the event loop while parquet is written: {pause * 1000:.0f} ms")

    back = store.records(7, "train")
    for before, after in zip(records, back, strict=True):
        expect("ids", after.trajectory.token_ids.tolist() == before.trajectory.token_ids.tolist(), True)
        expect("logprobs", after.trajectory.logprobs.bits() == before.trajectory.logprobs.bits(), True)
        expect("versions", after.trajectory.versions == before.trajectory.versions, True)
    judged = name != "short"  # 8 turns in 400 tokens: the texts are most of it
    return not judged or (size <= BYTES_A_TOKEN and (quick or rate >= TOKENS_A_SECOND))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_quick_option(parser)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    options = parser.parse_args()
    groups, samples = (2, 2) if options.quick else (32, 8)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        within = [
            measure(name, trajectories(groups, samples, length, random_ids=ids), Path(folder), quick=options.quick)
            for name, length, ids in (("random ids", 8000, True), ("text", 8000, False), ("short", 400, False))
        ]
    if options.quick:
        print(QUICK)
    if not all(within):
        raise SystemExit(f"over {BYTES_A_TOKEN:g} bytes a token, or under {TOKENS_A_SECOND:,.0f} tokens a second")


if __name__ == "__main__":
    main()
