"""Time to make a server serve a new policy version: half a billion parameters in bfloat16, 1 GB.

    python benchmarks/publish.py [--json FILE] [--quick]

Real parts: the trainer's publishers and the rank's side of them (`WeightPublisher`), HTTP, and the
rollout server in its own process with the torch engine, which reads, verifies and serves the
weights. The model is a Qwen2 with random weights.

`shm` is compared with a plain copy of the same bytes in memory (numpy, one thread, both sides
warm), `disk` with a plain write of the same bytes to a new file in the same folder and a plain read
of it into existing memory. Rounds alternate between ours and the plain one; the transports are
measured one after the other, as a run has only one. The result is the median over the rounds in
which other processes left the cores idle. A version is timed from the call to the server's
confirmation. Trainer and server are pinned to one core each: left to itself, the scheduler of a
machine with two cores puts both on one core in every third run, for the whole run.

Stall: meanwhile a request streams its tokens one by one. The longest gap between two of them during
an update, minus the usual gap, is compared with the time of that update plus 50 ms. Requests keep
their cache (`in_place`).

Exit code 1: a bound is not met.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from quick import QUICK, add_quick_option, expect
from quiet import QUIET_CORES, OtherLoad

BOUND_SHM = BOUND_DISK = 1.5
BOUND_STALL_S = 0.05
WARM_UP = 3
"""Publications of each kind that do not count: pages used for the first time cost many times as
much."""

FEWEST_QUIET = 5
"""Fewest quiet rounds to take a median of; with fewer of them, all rounds count."""

QWEN2_TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
"""For `--quick`."""

QWEN2_HALF_BILLION = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151_936, "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip


class ThisProcess:
    """The part of a `WorkerGroup` that publishers need, with a single rank in this process."""

    def __init__(self, folder: Path) -> None:
        import torch
        import torch.distributed as dist
        from transformers import AutoModelForCausalLM

        from trainer.learner.weights.publisher import WeightPublisher

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        self.lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        for parameter in self.lm.parameters():
            # Loaded tensors lie where they lay in the file, at odd multiples of 32 bytes; a rank of
            # the trainer allocates its own, at multiples of 64, which are copied a tenth faster.
            parameter.data = parameter.data.clone()
        self.publisher = WeightPublisher(self.lm, "bfloat16")

    def bytes(self) -> np.ndarray:
        """Return the bytes of all parameters."""
        import torch

        return torch.cat([p.detach().reshape(-1).view(torch.uint8) for p in self.lm.parameters()]).numpy()

    async def ask(self, command: Any) -> Any:
        """Run a command of a publisher. It sees a learner of which only `publisher` exists."""
        return await asyncio.to_thread(command.run, self)


def bytes_of(shape: dict[str, Any]) -> int:
    """Return the bytes of a Qwen2's parameters in bfloat16, with tied embeddings."""
    h, f = shape["hidden_size"], shape["intermediate_size"]
    kv = h * shape["num_key_value_heads"] // shape["num_attention_heads"]
    layer = (h * h + h) + 2 * (h * kv + kv) + h * h + 3 * h * f + 2 * h
    return 2 * (shape["vocab_size"] * h + shape["num_hidden_layers"] * layer + h)


def make_model(folder: Path, shape: dict[str, Any]) -> None:
    """Write a model with random weights, which takes some seconds."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**shape)).to(torch.bfloat16).save_pretrained(folder)


def start_server(model: Path, root: Path, scratch: Path) -> tuple[subprocess.Popen[bytes], str]:
    ready = scratch / "ready.json"
    process = subprocess.Popen(
        [
            sys.executable, "-P", "-m", "rollout_server", "--model", str(model), "--dtype", "bfloat16",
            "--max-running", "4", "--max-kv-tokens", "8192", "--weights-root", str(root), "--ready-file", str(ready),
            "--parent-pid", str(os.getpid()),
        ],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not ready.exists():
        if process.poll() is not None:
            raise SystemExit("the server did not start")
        time.sleep(0.1)
    return process, json.loads(ready.read_text())["url"]


class Watch:
    """Measures the load of other processes, so that rounds with much of it can be left out."""

    def __init__(self, server: int) -> None:
        self._mine = [psutil.Process(), psutil.Process(server)]

    def now(self) -> tuple[float, float]:
        """Return the time, and the CPU seconds of other processes."""
        own = sum(sum(process.cpu_times()[:2]) for process in self._mine)
        times = psutil.cpu_times()
        return time.perf_counter(), sum(times) - times.idle - getattr(times, "iowait", 0.0) - own

    def others(self, before: tuple[float, float]) -> float:
        """Return the number of cores that other processes used since `before`."""
        seconds, busy = (after - first for first, after in zip(before, self.now(), strict=True))
        return max(0.0, busy) / max(seconds, 1e-9)

    async def quiet(self, patience_s: float) -> None:
        """Wait until other processes are idle, for at most `patience_s` seconds."""
        end = time.monotonic() + patience_s
        while time.monotonic() < end:
            before = self.now()
            await asyncio.sleep(0.3)
            if self.others(before) < QUIET_CORES:
                return


def pin(pid: int, cores: set[int]) -> None:
    """Pin all threads of a process to some cores."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


def timed(action: Any) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def plain_disk(folder: Path, source: np.ndarray, target: np.ndarray) -> float:
    """Time a plain write and read of a file."""
    file = folder / "plain"

    def write_and_read() -> None:
        with file.open("wb", buffering=0) as out:
            view = memoryview(source)
            while view:
                view = view[out.write(view) :]
        with file.open("rb", buffering=0) as back:
            view = memoryview(target)
            while view:
                view = view[back.readinto(view) :]

    seconds = timed(write_and_read)
    file.unlink()
    return seconds


async def arrivals(url: str, times: list[float], ended: asyncio.Event) -> None:
    """Stream a request and record the time of each token."""
    sampling = {"max_new_tokens": 3000, "ignore_eos": True, "stream_interval": 1}
    request = {"input_ids": [5, 6, 7, 8], "sampling_params": sampling, "stream": True}
    async with httpx.AsyncClient(timeout=600) as http, http.stream("POST", f"{url}/generate", json=request) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.perf_counter())
            if ended.is_set():
                return


async def stall(publisher: Any, url: str, versions: range) -> list[dict[str, float]]:
    """Measure, for each version, the update's seconds and the longest gap between tokens around
    it."""
    times: list[float] = []
    ended = asyncio.Event()
    streaming = asyncio.create_task(arrivals(url, times, ended))
    while len(times) < 8:  # noqa: ASYNC110  # it fills as tokens come
        await asyncio.sleep(0.05)
    usual = statistics.median(np.diff(times))
    found = []
    for version in versions:
        begin = time.perf_counter()
        seconds = await publisher.publish(version)
        count = len(times)
        while len(times) < count + 4:  # noqa: ASYNC110  # as above
            await asyncio.sleep(0.02)
        around = [later - at for at, later in pairwise(times) if later >= begin]
        found.append({"update_s": seconds, "gap_s": max(around), "usual_s": float(usual)})
    ended.set()
    await streaming
    return found


async def measure(options: argparse.Namespace, scratch: Path, root: Path) -> dict[str, Any]:
    from trainer.publishing.disk import DiskPublisher
    from trainer.publishing.server_link import ServerLink
    from trainer.publishing.shared import SharedPublisher

    shape = QWEN2_TINY if options.quick else QWEN2_HALF_BILLION
    warm_up = 1 if options.quick else WARM_UP
    make_model(scratch / "model", shape)
    process, url = start_server(scratch / "model", root, scratch)
    workers = ThisProcess(scratch / "model")
    source = workers.bytes()
    expect("bytes of the weights", len(source), bytes_of(shape))
    target = np.zeros_like(source)
    link = ServerLink(url, running="in_place", token=None, timeout_s=120)
    ways = {
        "shm": SharedPublisher(workers, link, root, lambda *_: None),
        "disk": DiskPublisher(workers, link, root, lambda *_: None),
    }
    peers = {
        "shm": lambda: timed(lambda: np.copyto(target, source)),
        "disk": lambda: plain_disk(root, source, target),
    }
    watch = Watch(process.pid)
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    version = 0
    cores = sorted(os.sched_getaffinity(0))
    pin(process.pid, {cores[-1]})
    pin(os.getpid(), {cores[0]})
    for way, publisher in ways.items():
        for number in range(warm_up + options.rounds):
            await watch.quiet(options.patience if number >= warm_up else 0)
            before = watch.now()
            plain = peers[way]()
            version += 1
            ours = await publisher.publish(version)
            await check_served(url, version)
            if number >= warm_up:
                rounds[way].append({"ours_s": ours, "plain_s": plain, "others_cores": watch.others(before)})
    pin(process.pid, set(cores))
    pin(os.getpid(), set(cores))
    stalls = {}
    for way, publisher in ways.items():
        stalls[way] = await stall(publisher, url, range(version + 1, version + 1 + options.updates))
        version += options.updates
        await check_served(url, version)
    await link.close()
    process.terminate()
    process.wait()
    return {"bytes": len(source), "rounds": rounds, "stalls": stalls}


async def check_served(url: str, version: int) -> None:
    """Stop unless the server serves the version that was just published."""
    async with httpx.AsyncClient(timeout=60, trust_env=False) as http:
        facts = (await http.get(f"{url}/server_info")).json()
    expect("version that the server serves", str(facts["weight_version"]), str(version))


def quiet_rounds(rounds: list[dict[str, float]]) -> list[dict[str, float]]:
    """Those that had the cores for themselves; all, if hardly any had."""
    quiet = [one for one in rounds if one["others_cores"] < QUIET_CORES]
    return quiet if len(quiet) >= FEWEST_QUIET else rounds


def verdicts(results: dict[str, Any]) -> list[tuple[bool, str]]:
    """Every bound: whether it is met, in words."""
    found = []
    for way, bound, peer in (
        ("shm", BOUND_SHM, "a plain copy in memory"),
        ("disk", BOUND_DISK, "a plain write and read"),
    ):
        counted = quiet_rounds(results["rounds"][way])
        ours, plain = (statistics.median(one[name] for one in counted) for name in ("ours_s", "plain_s"))
        ratio = ours / plain
        found.append(
            (
                ratio <= bound,
                f"{way}: {1e3 * ours:.0f} ms, {peer} {1e3 * plain:.0f} ms: {ratio:.2f}, bound {bound} "
                f"({len(counted)} rounds)",
            )
        )
    for way, updates in results["stalls"].items():
        worst = max(updates, key=lambda u: u["gap_s"] - u["usual_s"] - u["update_s"])
        lost = worst["gap_s"] - worst["usual_s"]
        found.append(
            (
                lost <= worst["update_s"] + BOUND_STALL_S,
                f"{way}: a request stalls {1e3 * lost:.0f} ms in an update of {1e3 * worst['update_s']:.0f} ms, "
                f"bound that plus {1e3 * BOUND_STALL_S:.0f} ms (a token takes {1e3 * worst['usual_s']:.0f} ms)",
            )
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="publications of each kind that count")
    parser.add_argument("--patience", type=float, default=3.0, help="seconds to wait for a quiet moment, each time")
    parser.add_argument("--updates", type=int, default=5, help="updates in the middle of a stream")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="where versions are published")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    add_quick_option(parser)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.patience, options.updates = 1, 0.0, 1
    scratch = Path(tempfile.mkdtemp(prefix="agentloop-bench-"))
    root = Path(tempfile.mkdtemp(prefix="agentloop-bench-", dir=options.folder))
    try:
        with OtherLoad() as others:
            results = asyncio.run(measure(options, scratch, root))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(root, ignore_errors=True)
    found = verdicts(results)
    print(f"{results['bytes'] / 1e9:.2f} GB of weights, versions in {options.folder}")
    for met, text in found:
        print(f"{'met    ' if met else 'NOT MET'}  {text}")
    if others.cores is not None:
        busy = ": too much for a verdict" if others.cores > QUIET_CORES else ""
        print(f"Other processes took {others.cores:.2f} of the cores meanwhile{busy}.")
    if options.json:
        figures = {**results, "others_cores": others.cores, "verdicts": found}
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    if options.quick:
        print(QUICK)
    elif not all(met for met, _ in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
