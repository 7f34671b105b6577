"""Supervised fine-tuning: stages of rows through the same ranks, packing and loss code as reinforcement learning."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agentloop.config import SftRecipe, SftStage, TrainerConfig
from trainer.rundir import RunDir
from trainer.sft_data import SftRow, SftTokenizer, read_rows, shared_prefix
from trainer.types import LossSpec, TrainSample
from trainer.workers import WorkerGroup

OnLog = Callable[[dict[str, Any]], None]

KEPT_CHECKPOINTS = 2


@dataclass(slots=True)
class _Stage:
    """A stage with its tokenized rows and the global step it begins after."""

    config: SftStage
    number: int
    first: int
    rows: list[SftRow]
    prefix: np.ndarray
    tokenize_s: float

    @property
    def described(self) -> str:
        tokens = sum(len(row.token_ids) for row in self.rows)
        return (
            f"stage {self.config.name}: {len(self.rows)} rows, {tokens} tokens, {self.tokenize_s:.1f} s to tokenize; "
            f"{len(self.prefix)} first tokens are shared by most rows"
        )

    def batch(self, step: int, seed: int) -> list[TrainSample]:
        """The sequences of step `step` of the stage (from 0): a pure function, so that a resumed run sees the same."""
        size, count = self.config.batch_size, len(self.rows)
        order: dict[int, np.ndarray] = {}
        samples = []
        for position in range(step * size, (step + 1) * size):
            epoch, offset = divmod(position, count)
            if epoch not in order:
                order[epoch] = np.random.default_rng((seed, self.number, epoch)).permutation(count)
            samples.append(self._sample(self.rows[order[epoch][offset]], key=len(samples) + 1))
        return samples

    def _sample(self, row: SftRow, key: int) -> TrainSample:
        length = len(self.prefix)
        # At most up to the first trained token: nothing in a prompt is trained.
        shares = 0 < length <= int(np.argmax(row.loss_mask)) and np.array_equal(row.token_ids[:length], self.prefix)
        unused = np.zeros(len(row.token_ids), dtype=np.float32)
        return TrainSample(
            token_ids=row.token_ids,
            loss_mask=row.loss_mask,
            old_logprobs=unused,
            advantages=unused,
            prompt_length=length if shares else 1,
            group_key=0 if shares else key,
        )


async def run_sft(recipe: SftRecipe, run_dir: RunDir, *, resume: bool, on_log: OnLog) -> Path:
    """Run all stages and write the finished model with its tokenizer.

    Stopping at any time loses the steps since the last checkpoint; `resume` goes on from there, to the bit (one rank).

    Args:
        run_dir: opened by the caller; gets metrics, logs and checkpoints.
        on_log: called with `{"event": ...}` for phases and `{"step", "stage", "loss", ...}` every `log_every` steps.

    Returns:
        the model folder.

    Raises:
        DataError: a data file or row cannot be used.
        ModelError: the model or tokenizer cannot be loaded.
        WorkerError: a rank died.
    """
    checkpoints = run_dir.list_checkpoints() if resume else []
    done = checkpoints[-1].step if checkpoints else 0
    run_dir.rewind(done)
    tokenizer = SftTokenizer(recipe.model.path, recipe.max_tokens)
    out = recipe.out or run_dir.root / "model"
    total = sum(stage.steps for stage in recipe.stages)
    config = TrainerConfig(
        ranks=recipe.ranks,
        device=recipe.device,
        threads=recipe.threads,
        tokens_per_micro_batch=recipe.tokens_per_micro_batch,
        logprob_chunk=recipe.logprob_chunk,
        optim=recipe.stages[0].optim,
    )
    on_log({"event": f"start {recipe.ranks} rank{'s' * (recipe.ranks > 1)} on {recipe.device}"})
    workers = await WorkerGroup.start(
        model_path=recipe.model.path,
        config=config,
        dtype=recipe.model.dtype,
        total_steps=recipe.stages[0].steps,
        seed=recipe.seed,
        log_dir=run_dir.logs,
        init=recipe.model.init,
    )
    firsts = [sum(stage.steps for stage in recipe.stages[:number]) for number in range(len(recipe.stages))]
    todo = [number for number, stage in enumerate(recipe.stages) if done < firsts[number] + stage.steps]
    # One thread tokenizes the stages in their order, the later ones while the first trains.
    pool = ThreadPoolExecutor(1)
    loads = [pool.submit(_load_stage, recipe.stages[number], number, firsts[number], tokenizer) for number in todo]
    try:
        if not todo:
            await workers.load(checkpoints[-1].path / "trainer")
        for load in loads:
            stage = await asyncio.wrap_future(load)
            on_log({"event": stage.described})
            await workers.reset_optimizer(stage.config.optim, stage.config.steps)
            if load is loads[0] and checkpoints:
                await workers.load(checkpoints[-1].path / "trainer", optimizer=done > stage.first)
                on_log({"event": f"resume after step {done}"})
            await _run_stage(recipe, stage, max(done, stage.first), total, workers, run_dir, on_log)
        await workers.publish(out)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        await workers.close()
    tokenizer.save(out)
    on_log({"event": f"model written to {out}"})
    return out


async def _run_stage(
    recipe: SftRecipe,
    stage: _Stage,
    done: int,
    total: int,
    workers: WorkerGroup,
    run_dir: RunDir,
    on_log: OnLog,
) -> None:
    """Train from global step `done` to the end of the stage."""
    aggregation = "seq_mean_token_mean" if recipe.loss_aggregation == "seq_mean" else "token_mean"
    spec = LossSpec(kind="sft", aggregation=aggregation)
    window = _Window()
    end = stage.first + stage.config.steps
    for step in range(done + 1, end + 1):
        samples = stage.batch(step - 1 - stage.first, recipe.seed)
        sums = await workers.accumulate(samples, temperature=1.0, loss=spec)
        optimizer = await workers.step(sums["normalizer"])
        window.add(sums)
        if step % recipe.log_every == 0 or step == end:
            metrics = {"step": step, "steps": total, "stage": stage.config.name} | window.metrics() | optimizer
            run_dir.append_metrics(metrics)
            on_log(metrics)
            window = _Window()
        if step == total or (recipe.checkpoint_every and step % recipe.checkpoint_every == 0):
            await workers.save(run_dir.checkpoint_of(step), state={"step": step, "version": step})
            run_dir.prune(keep_checkpoints=KEPT_CHECKPOINTS, current_version=step)


def _load_stage(config: SftStage, number: int, first: int, tokenizer: SftTokenizer) -> _Stage:
    """Read and tokenize the rows of a stage."""
    begin = time.perf_counter()
    rows = list(_tokenized(Path(config.data), tokenizer))
    return _Stage(config, number, first, rows, shared_prefix(rows), time.perf_counter() - begin)


def _tokenized(path: Path, tokenizer: SftTokenizer) -> Iterator[SftRow]:
    for number, row in enumerate(read_rows(path), 1):
        yield tokenizer.row(row, f"{path}:{number}")


class _Window:
    """Means over the steps since the last log line."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._sums: dict[str, float] = {}

    def add(self, sums: dict[str, float]) -> None:
        for key in ("loss_sum", "normalizer", "tokens", "packed_tokens", "entropy_sum"):
            self._sums[key] = self._sums.get(key, 0.0) + sums[key]

    def metrics(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._begin
        return {
            "loss": self._sums["loss_sum"] / self._sums["normalizer"],
            "entropy": self._sums["entropy_sum"] / self._sums["tokens"],
            "tokens_per_s": self._sums["packed_tokens"] / seconds,
            "time_s": seconds,
        }
