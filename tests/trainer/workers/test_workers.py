"""The rank processes: what they compute does not depend on their number, and nobody is left when one dies."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from agentloop.config import OptimConfig, TrainerConfig
from agentloop.errors import ModelError, WorkerError
from tests.trainer.conftest import make_samples, start_workers
from trainer.channel import BlockingChannel, arrays_to_samples, samples_to_arrays
from trainer.types import LossSpec, TrainSample
from trainer.workers.group import WorkerGroup, _cause
from trainer.workers.rank import RankDied
from trainer.workers.samples import by_gradient

# An epsilon far above any gradient makes AdamW's first step plain gradient descent with step size lr / eps = 1: the
# change of the published weights is the gradient.
DESCENT = {"lr": 1e6, "eps": 1e6, "grad_clip": 1e9}

SPECS = [
    LossSpec(aggregation="seq_mean_token_mean", entropy_coef=0.01),
    LossSpec(kind="pg", aggregation="seq_mean_token_sum"),
    LossSpec(entropy_coef=0.01),
]


@asynccontextmanager
async def started(model: Path, tmp_path: Path, **config: Any) -> AsyncIterator[WorkerGroup]:
    workers = await start_workers(
        model_path=str(model),
        config=TrainerConfig.model_validate({"optim": DESCENT} | config),
        dtype="float32",
        total_steps=10,
        seed=0,
        log_dir=tmp_path / "logs",
    )
    try:
        yield workers
    finally:
        await workers.close()


def flat(folder: Path) -> np.ndarray:
    tensors = load_file(folder / "model.safetensors")
    return np.concatenate([tensors[name].ravel().astype(np.float64) for name in sorted(tensors)])


def processes_of(workers: WorkerGroup) -> list[psutil.Process]:
    return [psutil.Process(rank.process.pid) for rank in workers._ranks]


async def test_two_ranks_compute_the_gradient_of_one(tiny_model: Path, tmp_path: Path) -> None:
    samples = make_samples(groups=3, size=6)
    for sample, weight in zip(samples, (1.0, 0.5, 0.25) * 6, strict=True):
        sample.weight = weight
    for sample in samples[6:12]:  # a group without a gradient, unless the loss has an entropy term
        sample.advantages[:] = 0
    uneven = samples[:1]  # the second rank has nothing to do in this call, and must not hang
    results: dict[int, list[Any]] = {}
    for ranks in (2, 1):
        async with started(tiny_model, tmp_path, ranks=ranks, tokens_per_micro_batch=128) as workers:
            start = tmp_path / f"start_{ranks}"
            await workers.save(start, state={})
            results[ranks] = []
            for spec in SPECS:
                sums = await workers.accumulate(samples, temperature=1.0, loss=spec)
                extra = await workers.accumulate(uneven, temperature=1.0, loss=spec)
                norm = (await workers.step(sums["normalizer"] + extra["normalizer"]))["grad_norm"]
                await workers.publish(tmp_path / f"ranks_{ranks}")
                gradient = flat(tmp_path / f"ranks_{ranks}") - flat(tiny_model)
                results[ranks].append((gradient, sums | {"grad_norm": norm}, extra))
                if spec is not SPECS[-1]:
                    await workers.load(start / "trainer")
            await workers.save(tmp_path / f"step_{ranks}", state={"ranks": ranks})
            logprobs = await workers.logprobs(samples, temperature=1.0)
            clipped = DESCENT | {"grad_clip": 0.1}
            await workers.load(start / "trainer")
            await workers.reset_optimizer(OptimConfig.model_validate(clipped), 10)
            await workers.accumulate(samples, temperature=1.0, loss=SPECS[-1])
            await workers.accumulate(uneven, temperature=1.0, loss=SPECS[-1])
            assert (await workers.step(sums["normalizer"] + extra["normalizer"]))["grad_norm"] == norm
            await workers.publish(tmp_path / "clipped")
            change = flat(tmp_path / "clipped") - flat(tiny_model)
            assert np.linalg.norm(change) == pytest.approx(0.1, rel=1e-3), "the norm over all ranks is clipped"
            assert change @ gradient > 0.999 * np.linalg.norm(change) * np.linalg.norm(gradient)
            await workers.load(tmp_path / f"step_{ranks}" / "trainer")
            size = (tiny_model / "model.safetensors").stat().st_size
            for rank in range(ranks):  # each has read its rows and nothing else
                log = (tmp_path / "logs" / f"trainer_rank{rank}.log").read_text()
                read = int(re.findall(r"read (\d+) of the \d+ bytes of tensors", log)[-1])
                assert read == pytest.approx(size / ranks, rel=0.05)
            if ranks == 1:  # a checkpoint of two ranks is read by one
                await workers.load(tmp_path / "step_2" / "trainer")
                await workers.publish(tmp_path / "again")
                assert np.array_equal(flat(tmp_path / "again"), flat(tmp_path / "ranks_2"))
            results[ranks].append(logprobs)
    *ones, logprobs_1 = results[1]
    *twos, logprobs_2 = results[2]
    for spec, (one, sums_1, extra_1), (two, sums_2, extra_2) in zip(SPECS, ones, twos, strict=True):
        assert np.linalg.norm(one) > 0.1, spec
        assert np.linalg.norm(two - one) < 1e-6 * np.linalg.norm(one), spec
        assert sums_1["micro_batches"] > 1
        for key in sums_1.keys() - {"time_s", "packed_tokens", "micro_batches"}:
            assert sums_2[key] == pytest.approx(sums_1[key], rel=1e-6), (spec, key)
        for key in extra_1.keys() - {"time_s", "packed_tokens", "micro_batches"}:
            assert extra_2[key] == pytest.approx(extra_1[key], rel=1e-6), (spec, key)
    for sample, a, b in zip(samples, logprobs_1, logprobs_2, strict=True):
        assert np.abs(a - b).max() < 1e-4
        assert (a[sample.loss_mask] < 0).all()
        assert not a[~sample.loss_mask].any()


def test_only_whole_groups_without_any_gradient_are_set_apart() -> None:
    samples = make_samples(groups=3, size=2)
    for sample in (samples[0], samples[2], samples[3]):
        sample.advantages[:] = 0
    with_gradient, without = by_gradient(samples, LossSpec(kind="pg"))
    assert [sample.group_key for sample in with_gradient] == [0, 0, 2, 2]
    assert [sample.group_key for sample in without] == [1, 1]
    samples[2].advantages[samples[2].loss_mask.argmax()] = np.nan  # is found by the norm of the gradient
    assert by_gradient(samples, LossSpec(kind="pg"))[1] == []
    samples[2].advantages[:] = 0
    for spec in (LossSpec(entropy_coef=0.1), LossSpec(kl_coef=0.1), LossSpec(kind="sft")):
        assert by_gradient(samples, spec) == (samples, [])


async def test_ranks_add_up_the_same_gradient_after_each_micro_batch_or_once(tiny_model: Path, tmp_path: Path) -> None:
    samples = make_samples(groups=3, size=6)
    found = []
    for each in (True, False):
        settings = {"ranks": 2, "tokens_per_micro_batch": 128, "fsdp": {"reduce_each_micro_batch": each}}
        async with started(tiny_model, tmp_path, **settings) as workers:
            sums = await workers.accumulate(samples, temperature=1.0, loss=SPECS[0])
            assert sums["micro_batches"] > 2, "each rank has more than one"
            await workers.step(sums["normalizer"])
            await workers.publish(tmp_path / str(each))
            found.append(flat(tmp_path / str(each)) - flat(tiny_model))
    assert np.linalg.norm(found[0]) > 0.1
    assert np.linalg.norm(found[1] - found[0]) < 1e-6 * np.linalg.norm(found[0])


async def test_a_dead_rank_is_a_worker_error_with_its_log_and_ends_the_others(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "trainer_rank1.log").write_text("the last words of an earlier start\n")
    async with started(tiny_model, tmp_path, ranks=2) as workers:
        processes = processes_of(workers)
        with (tmp_path / "logs" / "trainer_rank1.log").open("a") as log:
            log.write("the last words of rank 1\n")
        processes[1].kill()
        with pytest.raises(WorkerError, match=r"rank 1 died \(exit code -9\)(.|\n)*the last words of rank 1") as caught:
            await workers.accumulate(make_samples(), temperature=1.0)
        assert "earlier start" not in str(caught.value)
        with pytest.raises(WorkerError, match="failed earlier"):
            await workers.step(1.0)
    assert not any(process.is_running() for process in processes)


async def test_a_stopped_rank_is_named_with_the_command_and_ends_the_others(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentloop.runtime.child.STOPPED_S", 0.3)
    monkeypatch.setattr("trainer.workers.watch.WATCH_S", 0.1)
    async with started(tiny_model, tmp_path, ranks=2) as workers:
        processes = processes_of(workers)
        processes[1].suspend()
        with pytest.raises(WorkerError, match=rf"rank 1 \(process {processes[1].pid}\) was stopped for 0 s during Acc"):
            await workers.accumulate(make_samples(), temperature=1.0)
    assert not any(process.is_running() for process in processes)


async def test_a_rank_that_does_not_answer_in_time_is_named_with_the_command(tmp_path: Path) -> None:
    class Silent:
        stopped = False

        def __init__(self, number: int, answers: bool) -> None:
            self.number, self.log, self.answers, self.killed = number, tmp_path / "log", answers, asyncio.Event()

        async def call(self, *_: Any) -> Any:
            if not self.answers:
                await self.killed.wait()
            return None, []

        def kill(self) -> None:
            self.killed.set()

    ranks: Any = [Silent(number, answers=number == 1) for number in range(3)]
    workers = WorkerGroup(ranks, TrainerConfig(timeout_s=0.05), 32)
    with pytest.raises(WorkerError, match=r"ranks 0, 2 did not answer Layout within \d+ s(?s:.*)trainer\.timeout_s"):
        await asyncio.wait_for(workers.layout(), 30)
    with pytest.raises(WorkerError, match="failed earlier"):
        await workers.layout()


async def test_the_death_of_a_rank_is_told_and_not_what_another_one_says_of_it() -> None:
    async def lost() -> Any:
        raise WorkerError("rank 0 failed: connection reset by peer")

    async def died() -> Any:
        await asyncio.sleep(0.05)
        raise RankDied("rank 1 died")

    async def works() -> Any:
        return {}, []

    for others, told in ((died, "rank 1 died"), (works, "rank 0 failed")):
        calls = [asyncio.ensure_future(lost()), asyncio.ensure_future(others())]
        with pytest.raises(WorkerError) as first:
            await asyncio.gather(*calls)
        assert told in str(await _cause(first.value, calls))


async def test_a_model_that_cannot_be_loaded_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        async with started(tmp_path / "empty", tmp_path):
            pass


async def test_bad_samples_are_refused_before_they_reach_a_rank(tiny_model: Path, tmp_path: Path) -> None:
    workers = WorkerGroup([], TrainerConfig(), 32)
    samples = make_samples()
    with pytest.raises(ValueError, match="temperature 0"):
        await workers.accumulate(samples, temperature=0.0)
    samples[2].advantages = samples[2].advantages[:-1]
    with pytest.raises(ValueError, match="sample 2: advantages has"):
        await workers.accumulate(samples, temperature=1.0)
    for sample in samples:
        sample.loss_mask = np.zeros(len(sample), dtype=bool)
        sample.advantages = sample.old_logprobs
    assert (await workers.accumulate(samples, temperature=1.0))["normalizer"] == 0.0


def test_ranks_die_with_their_parent(tiny_model: Path, tmp_path: Path) -> None:
    program = f"""
        import asyncio, os
        from pathlib import Path
        from agentloop.config import OptimConfig, TrainerConfig
        from trainer.workers.group import WorkerGroup

        async def main():
            workers = await WorkerGroup.start(
                model_path={str(tiny_model)!r}, config=TrainerConfig(), dtype="float32", total_steps=1, seed=0,
                log_dir=Path({str(tmp_path)!r}),
            )
            print(workers._ranks[0].process.pid, flush=True)
            os.kill(os.getpid(), 9)

        asyncio.run(main())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the rank outlives its parent"
        time.sleep(0.05)


def test_the_main_process_needs_no_torch() -> None:
    program = "import sys, trainer.workers, trainer.sft, trainer.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_rank_whose_main_process_is_gone_ends_without_a_traceback() -> None:
    ours, theirs = socket.socketpair()
    channel = BlockingChannel(theirs)
    ours.sendall(b"unread by the other end")
    theirs.sendall(b"and by this one, which makes the end a reset")
    ours.close()
    channel.send({"ok": None}, [np.zeros(10)])
    assert channel.receive() is None
    theirs.close()


def test_samples_survive_the_channel() -> None:
    samples = make_samples()
    samples[0].weight = 0.25
    assert arrays_to_samples(samples_to_arrays(samples), TrainSample)[0].proximal_logprobs is None
    for sample in samples:
        sample.proximal_logprobs = sample.old_logprobs * np.float32(0.9)
    for before, after in zip(samples, arrays_to_samples(samples_to_arrays(samples), TrainSample), strict=True):
        for name in ("token_ids", "loss_mask", "old_logprobs", "advantages", "proximal_logprobs"):
            assert np.array_equal(getattr(before, name), getattr(after, name))
        assert (before.prompt_length, before.group_key, before.weight) == (
            after.prompt_length, after.group_key, after.weight,
        )  # fmt: skip
    assert arrays_to_samples(samples_to_arrays([]), TrainSample) == []


async def test_commands_run_in_order_and_a_cancelled_one_is_finished(tiny_model: Path, tmp_path: Path) -> None:
    samples = make_samples()
    async with started(tiny_model, tmp_path, optim={"lr": 0.0}) as workers:
        calls = [workers.accumulate(half, temperature=1.0) for half in (samples[:4], samples[4:])]
        first, second, step = await asyncio.gather(*calls, workers.step(1.0))
        assert step["grad_norm"] > 0
        assert first["tokens"] + second["tokens"] == sum(sample.trained_tokens for sample in samples)
        call = asyncio.create_task(workers.accumulate(samples, temperature=1.0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await workers.save(tmp_path / "step_1", state={"step": 1})
        assert (tmp_path / "step_1" / "state.json").is_file()
        # Long enough to be at it still when the group is closed.
        busy = asyncio.create_task(workers.accumulate(samples * 300, temperature=1.0))
        await asyncio.sleep(0.01)
    with pytest.raises(WorkerError, match="died"):  # closing does not wait for it
        await busy
