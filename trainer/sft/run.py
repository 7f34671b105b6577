"""Run the stages of supervised fine-tuning, evaluate, save, and write the model."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from agentloop.config import CheckpointConfig, SftRecipe, TrainerConfig
from agentloop.files import partial_of, rename_folder
from agentloop.model_folder import check_target, copy_tokenizer, find_model
from agentloop.text import seconds
from trainer.checkpoint_files import read_state
from trainer.run.checkpoints import find_adapters
from trainer.run.rundir import RunDir
from trainer.run.stop import on_stop_signals
from trainer.sft.stage import Stage, TokenizedRows, tokenize_rows
from trainer.sft.tokenizing import SftTokenizer
from trainer.types import LossSpec, TrainSample
from trainer.workers.group import WorkerGroup

OnLog = Callable[[dict[str, Any]], None]
OnProgress = Callable[[int, int, str], None]

ETA_STEPS = 100
"""Recent steps from which the remaining time is estimated."""

SAID_EVERY_S = 10.0
"""Interval of progress lines during a long tokenization."""

EVAL_MICRO_BATCHES = 8
"""Micro-batches per rank in one call of an evaluation."""


def trainer_config(recipe: SftRecipe) -> TrainerConfig:
    """Return the settings of the ranks."""
    return TrainerConfig(
        ranks=recipe.ranks,
        device=recipe.device,
        threads=recipe.threads,
        timeout_s=recipe.timeout_s,
        tokens_per_micro_batch=recipe.tokens_per_micro_batch,
        logprob_chunk=recipe.logprob_chunk,
        optim=recipe.stages[0].optim,
        freeze_vision=recipe.freeze_vision,
        fsdp=recipe.fsdp,
        lora=recipe.lora,
    )


class SftRun:
    """One run of an SFT recipe. Call `await SftRun(...).run()` once.

    Args:
        run_dir: opened by the caller; receives metrics, logs and checkpoints.
        resume: continue from the newest checkpoint; bit-exact with one rank.
        on_log: called with `{"event": ...}` for phases and with every line of metrics.
        on_progress: called with the step, the total, and a short text.

    Attributes:
        done: the step from which a resumed run continues.
        steps: steps that are done.
    """

    def __init__(
        self, recipe: SftRecipe, run_dir: RunDir, *, resume: bool, on_log: OnLog, on_progress: OnProgress | None = None
    ) -> None:
        self._recipe = recipe
        self._dir = run_dir
        self._resume = resume
        self._on_log = on_log
        self._on_progress = on_progress or (lambda done, total, words: None)
        checkpoint = run_dir.resume_point if resume else None
        self._checkpoint = checkpoint.path if checkpoint else None
        self.done = checkpoint.step if checkpoint else 0
        self.steps = self.done
        self._state = read_state(checkpoint.path) if checkpoint else {}
        self._window = _Window(self._state.get("window"))
        self._digests: dict[str, str] = dict(self._state.get("data", {}))
        self._step_times: deque[float] = deque(maxlen=ETA_STEPS)
        self._stop = asyncio.Event()
        self._closed = False
        self._loads: dict[int, Future[TokenizedRows]] = {}
        self._eval_load: Future[TokenizedRows] | None = None

    @property
    def progressed(self) -> bool:
        """Whether this process trained a step: repeating the command does not only fail again."""
        return self.steps > self.done

    async def run(self) -> Path | None:
        """Run all stages and write the finished model with its tokenizer.

        Returns:
            The model folder; None: the run was stopped, and its last step is saved.

        Raises:
            DataError: a data file or row cannot be used.
            ModelError: the model, its tokenizer or its chat template cannot be used.
            WorkerError: a rank died.
        """
        recipe = self._recipe
        out = recipe.out or self._dir.root / "model"
        if recipe.out is not None:
            check_target(out, replace=True, source=recipe.model.path, key="out")
        folder = find_model(
            recipe.model.path,
            lambda warning: self._on_log({"event": f"warning: {warning}"}),
            trust_remote_code=recipe.model.trust_remote_code,
            weights=recipe.model.init == "weights",
        )
        model_path = str(folder.path)
        if self._resume:
            # -1 without a checkpoint: the first evaluation is repeated
            self._dir.rewind(self.done or -1, lambda text: self._on_log({"event": text}))

        adapters = find_adapters(recipe.lora, model_path)
        local = recipe.model.model_copy(update={"path": model_path})
        tokenizer = SftTokenizer.load(local, recipe.max_tokens, overlong=recipe.overlong)
        pool = ThreadPoolExecutor(1)
        with self._signals():
            try:
                self._start_to_tokenize(pool, tokenizer)
                workers = await self._start_workers(model_path, adapters)
                try:
                    return await self._publish(workers, out, model_path) if await self._train(workers) else None
                finally:
                    await workers.close()
            finally:
                self._closed = True
                pool.shutdown(wait=False, cancel_futures=True)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Let Ctrl-C save the current step and end the run; a second one ends it at once."""
        main = asyncio.current_task()
        assert main is not None

        def stop() -> None:
            if self._stop.is_set() or not self._step_times:
                main.cancel()
            self._stop.set()

        with on_stop_signals(stop):
            yield

    async def _start_workers(self, model_path: str, adapters: Path | None) -> WorkerGroup:
        recipe = self._recipe
        self._on_log({"event": f"start {recipe.ranks} rank{'s' * (recipe.ranks > 1)} on {recipe.device}"})
        return await WorkerGroup.start(
            model_path=model_path,
            config=trainer_config(recipe),
            dtype=recipe.model.dtype,
            total_steps=1,  # every stage sets its own
            seed=recipe.seed,
            log_dir=self._dir.logs,
            init=recipe.model.init,
            trust_remote_code=recipe.model.trust_remote_code,
            adapters=adapters,
        )

    # -- data --------------------------------------------------------------------------------------

    def _start_to_tokenize(self, pool: ThreadPoolExecutor, tokenizer: SftTokenizer) -> None:
        """Tokenize in one thread, in order of need: later stages while the first one trains."""
        recipe = self._recipe
        if recipe.eval_data is not None:
            self._eval_load = pool.submit(
                tokenize_rows, recipe.eval_data, "eval_data", tokenizer,
                max_rows=recipe.eval_max_rows, on_row=self._watch("eval_data"),
            )  # fmt: skip
        steps = [stage.steps for stage in recipe.stages]
        end = 0
        for number, stage in enumerate(recipe.stages):
            end += stage.steps or 0
            if None in steps or self.done < end:  # with epochs, the end depends on the number of rows
                self._loads[number] = pool.submit(
                    tokenize_rows, stage.data, f"stages[{number}].data", tokenizer, on_row=self._watch(stage.name)
                )

    def _watch(self, name: str) -> Callable[[int], None]:
        """Return a callback that logs a tokenization and ends it together with the run."""
        said = time.monotonic()

        def on_row(count: int) -> None:
            nonlocal said
            if self._closed:
                raise InterruptedError("the run has ended")
            if time.monotonic() - said >= SAID_EVERY_S:
                said = time.monotonic()
                self._on_log({"event": f"{name}: {count:,} rows tokenized"})

        return on_row

    async def _stage(self, number: int, first: int) -> Stage:
        """Return a stage once its rows are tokenized."""
        recipe = self._recipe
        data = await asyncio.wrap_future(self._loads[number])
        seed = recipe.seed if recipe.data_seed is None else recipe.data_seed
        return Stage(recipe.stages[number], number, first, data, seed, shuffle=recipe.shuffle)

    async def _left(self) -> tuple[list[tuple[int, int]], int]:
        """Return the unfinished stages (number, step before the first) and the total of steps."""
        left, first = [], 0
        for number, config in enumerate(self._recipe.stages):
            end = first + (config.steps or (await self._stage(number, first)).steps)
            left += [(number, first)] if self.done < end else []
            first = end
        return left, first

    def _note_rows(self, stage: Stage) -> None:
        """Log if the rows of a resumed run have changed."""
        number, digest = str(stage.number), stage.data.digest
        if self._digests.get(number, digest) != digest:
            self._on_log({"event": f"changed since the run was started: the rows of stage {stage.config.name}"})
        self._digests[number] = digest

    # -- training ----------------------------------------------------------------------------------

    async def _train(self, workers: WorkerGroup) -> bool:
        """Train the unfinished stages; return False if the run was stopped."""
        held_out = await self._held_out()
        left, total = await self._left()
        if self._checkpoint is not None and not left:
            await workers.load(self._checkpoint / "trainer", optimizer=False)
        if not self.done:
            await self._log_eval(workers, held_out, 0, total)

        for number, first in left:
            stage = await self._stage(number, first)
            self._note_rows(stage)
            self._on_log({"event": f"stage {stage.config.name}: {stage.steps:,} steps of {stage.data.described}"})

            # The new optimizer first: a checkpoint from inside the stage then fills it.
            await workers.reset_optimizer(stage.config.optim, stage.steps)
            if self._checkpoint is not None and (number, first) == left[0]:
                # A checkpoint at a stage's end continues with its weights only: each stage has its
                # own optimizer.
                await workers.load(self._checkpoint / "trainer", optimizer=self.done > first)
                self._on_log({"event": f"resume after step {self.done}"})

            if not await self._run_stage(stage, workers, held_out, total):
                return False
            del self._loads[number]
        return True

    async def _held_out(self) -> list[TrainSample]:
        """Return the samples of `eval_data` once they are tokenized."""
        if self._eval_load is None:
            return []
        data = await asyncio.wrap_future(self._eval_load)
        self._on_log({"event": f"eval_data: {data.described}"})
        return [data.sample(index, key=index + 1) for index in range(len(data.rows))]

    async def _run_stage(self, stage: Stage, workers: WorkerGroup, held_out: list[TrainSample], total: int) -> bool:
        """Train a stage; return whether its end was reached."""
        recipe = self._recipe
        spec = LossSpec(
            kind="sft", aggregation="seq_mean_token_mean" if recipe.loss_aggregation == "seq_mean" else "token_mean"
        )

        for step in range(max(self.done, stage.first) + 1, stage.end + 1):
            self._raise_failures()
            begin = time.perf_counter()
            sums = await workers.accumulate(stage.batch(step), temperature=1.0, loss=spec)
            optimizer = await workers.step(sums["normalizer"])
            self.steps = step
            self._step_times.append(time.perf_counter() - begin)
            self._window.add(sums, self._step_times[-1])

            left = (total - step) * sum(self._step_times) / len(self._step_times)
            words = f"{stage.config.name}  {self._window.tokens_per_s:,.0f} tokens/s  {seconds(left)} left"
            self._on_progress(step, total, words)

            # Log and evaluate before saving: the checkpoint holds the window as it is after the log
            # line, and `keep_best` needs the loss of this step.
            if step % recipe.log_every == 0 or step == stage.end:
                metrics = {"step": step, "steps": total, "stage": stage.config.name, **self._window.metrics()}
                self._log(metrics | optimizer | {"eta_s": left})
                self._window = _Window()
            if step == total or (recipe.eval_every and step % recipe.eval_every == 0):
                await self._log_eval(workers, held_out, step, total)

            stopping = self._stop.is_set() and step < total
            if step == total or stopping or (recipe.checkpoint_every and step % recipe.checkpoint_every == 0):
                await self._save(workers, step)
            if stopping:
                return False
        return True

    def _raise_failures(self) -> None:
        """Raise errors in the rows of later stages as soon as they are found."""
        for load in self._loads.values():
            if load.done():
                load.result()

    async def _save(self, workers: WorkerGroup, step: int) -> None:
        state = {"step": step, "version": step, "window": self._window.state, "data": self._digests}
        await workers.save(self._dir.checkpoint_of(step), state=state)
        recipe = self._recipe
        kept = {"keep": recipe.checkpoint_keep, "keep_best": recipe.checkpoint_keep_best}
        self._dir.prune_checkpoints(CheckpointConfig(**kept, best_metric="eval/loss", best_is="lowest"))

    async def _log_eval(self, workers: WorkerGroup, held_out: list[TrainSample], step: int, total: int) -> None:
        if held_out:
            budget = EVAL_MICRO_BATCHES * self._recipe.tokens_per_micro_batch * self._recipe.ranks
            metrics = await evaluate_loss(workers, held_out, budget)
            self._log({"step": step, "steps": total, **metrics})

    def _log(self, metrics: dict[str, Any]) -> None:
        self._dir.append_metrics(metrics)
        self._on_log(metrics)

    async def _publish(self, workers: WorkerGroup, out: Path, model_path: str) -> Path:
        """Write the model folder, which appears together with its tokenizer."""
        whole = partial_of(out)
        await workers.publish(whole)
        try:
            copy_tokenizer(model_path, whole, self._recipe.model.chat_template)
            rename_folder(whole, out)
        except BaseException:
            shutil.rmtree(whole, ignore_errors=True)
            raise
        return out


async def evaluate_loss(workers: WorkerGroup, samples: Sequence[TrainSample], budget: int) -> dict[str, float]:
    """Return the mean loss over all trained tokens of `samples` (not the mean of sequence means).

    Args:
        budget: tokens of one call; bounds memory and has no other effect.
    """
    begin = time.perf_counter()
    total, tokens, start = 0.0, 0, 0
    while start < len(samples):
        end, size = start, 0
        while end < len(samples) and (end == start or size + len(samples[end]) <= budget):
            size += len(samples[end])
            end += 1

        part = samples[start:end]
        for sample, logprobs in zip(part, await workers.logprobs(part, temperature=1.0), strict=True):
            total -= float(np.sum(logprobs[sample.loss_mask], dtype=np.float64))
            tokens += sample.trained_tokens
        start = end
    return {"eval/loss": total / tokens, "eval/tokens": tokens, "eval/time_s": time.perf_counter() - begin}


class _Window:
    """Means over the steps since the last log line. Checkpoints hold `state` for a resumed run."""

    def __init__(self, state: dict[str, float] | None = None) -> None:
        self.state: dict[str, float] = dict(state or {})

    def add(self, sums: dict[str, float], seconds: float) -> None:
        for key in ("loss_sum", "normalizer", "tokens", "packed_tokens", "entropy_sum"):
            self.state[key] = self.state.get(key, 0.0) + sums[key]
        self.state["seconds"] = self.state.get("seconds", 0.0) + seconds

    @property
    def tokens_per_s(self) -> float:
        return self.state["packed_tokens"] / self.state["seconds"]

    def metrics(self) -> dict[str, float]:
        return {
            "loss": self.state["loss_sum"] / self.state["normalizer"],
            "entropy": self.state["entropy_sum"] / self.state["tokens"],
            "tokens_per_s": self.tokens_per_s,
            "time_s": self.state["seconds"],
        }
