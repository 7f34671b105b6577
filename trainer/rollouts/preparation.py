"""What is found out of samples before they are trained: reference and proximal logprobs, values, advantages. No torch.

Groups are prepared chunk by chunk, as they come. What only the whole batch can say, whitening, comes in `finish`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from agentloop.config import Recipe
from trainer.algorithms.advantage import whiten
from trainer.algorithms.kl import KlCoefficient, estimate
from trainer.rollouts.producer import Group
from trainer.rollouts.samples import TrainGroup, collect, set_advantages
from trainer.types import LossSpec, ValueSample
from trainer.workers.group import WorkerGroup


class BatchPreparation:
    """The way of one step's groups to the trainer's ranks.

    Args:
        kl: the coefficient of the KL term, as it is in this step.
    """

    def __init__(self, recipe: Recipe, workers: WorkerGroup, kl: KlCoefficient) -> None:
        self._recipe = recipe
        self._algorithm = recipe.trainer.algorithm
        self._workers = workers
        self._kl_coef = kl.value  # of this step, whatever it is led to by its end
        self._kl_sum = 0.0
        self._rewards: list[float] = []
        self._baselines: list[float] = []
        self._without_baseline = 0
        self._values: list[np.ndarray] = []
        self._returns: list[np.ndarray] = []

    @property
    def loss(self) -> LossSpec:
        """The loss of this step."""
        spec = LossSpec.from_config(self._algorithm)
        return replace(spec, kl_coef=self._kl_coef) if spec.kl_coef else spec

    def collect(self, group: Group) -> TrainGroup:
        """The trainable episodes of a group, their rewards shaped."""
        shaping = self._algorithm.shaping
        batch = collect(
            group,
            shaping if shaping.chosen else None,
            lambda agent: self._recipe.agent(agent).max_response_tokens,
        )
        self._rewards += [episode.reward for episode in batch.episodes]
        if self._algorithm.advantage == "remax":
            self._without_baseline += batch.baseline is None
            self._baselines += [] if batch.baseline is None else [batch.baseline]
        return batch

    async def prepare(self, chunk: Sequence[TrainGroup]) -> None:
        """Give the samples of some groups their advantages, and what the loss reads beside them."""
        episodes = [episode for batch in chunk for episode in batch.episodes]
        samples = [sample for episode in episodes for sample in episode.samples]
        if not samples:
            return
        temperature = self._recipe.rollout.sampling.temperature
        if self._algorithm.kl_coef and self._algorithm.kl_in == "reward":
            reference = iter(await self._workers.logprobs(samples, temperature=temperature, of="reference"))
            for episode in episodes:
                episode.penalties = []
                for sample in episode.samples:
                    kl = estimate(self._algorithm.kl_estimator, sample.old_logprobs, next(reference))
                    kl[~sample.loss_mask] = 0.0
                    self._kl_sum += float(kl.sum())
                    episode.penalties.append(self._kl_coef * kl)
        if self._algorithm.correction.chosen and self._algorithm.minibatches > 1:
            proximal = await self._workers.logprobs(samples, temperature=temperature)
            for sample, column in zip(samples, proximal, strict=True):
                sample.proximal_logprobs = column
        if self._algorithm.advantage == "gae":
            values = iter(await self._workers.values(samples))
            for episode in episodes:
                episode.values = [next(values) for _ in episode.samples]
        for batch in chunk:
            set_advantages(batch, self._algorithm)

    def value_samples(self, chunk: Sequence[TrainGroup]) -> list[ValueSample]:
        """Return the samples that the critic is trained on."""
        found = []
        for batch in chunk:
            for episode in batch.episodes:
                assert episode.values is not None and episode.returns is not None, "prepared"
                for sample, values, returns in zip(episode.samples, episode.values, episode.returns, strict=True):
                    found.append(ValueSample.of(sample, values=values, returns=returns))
                    self._values.append(values[sample.loss_mask])
                    self._returns.append(returns[sample.loss_mask])
        return found

    def finish(self, batch: Sequence[TrainGroup]) -> None:
        """Whiten the advantages of a whole batch, where the estimator is whitened."""
        if not self._algorithm.whitens:
            return
        samples = [sample for group in batch for sample in group.samples]
        columns = [sample.advantages[sample.loss_mask] for sample in samples]
        for sample, column in zip(samples, whiten(columns, [sample.weight for sample in samples]), strict=True):
            sample.advantages[sample.loss_mask] = column

    @property
    def sums(self) -> dict[str, float]:
        """What the ranks' sums lack: `kl_ref_sum` of a penalty in the reward."""
        return {"kl_ref_sum": self._kl_sum}

    @property
    def metrics(self) -> dict[str, float | None]:
        """Numbers of the step that only some algorithms have."""
        found: dict[str, float | None] = {}
        if self._algorithm.kl_coef:
            found["train/kl_coef"] = self._kl_coef
        if self._algorithm.shaping.chosen:
            found["reward/shaped_mean"] = _mean(self._rewards)
        if self._algorithm.advantage == "remax":
            found["remax/baseline_mean"] = _mean(self._baselines)
            found["remax/without_baseline"] = self._without_baseline
        if self._returns:
            values, returns = np.concatenate(self._values), np.concatenate(self._returns)
            spread = float(returns.var(dtype=np.float64))
            found["critic/value_mean"] = float(values.mean(dtype=np.float64))
            found["critic/return_mean"] = float(returns.mean(dtype=np.float64))
            left = float((returns - values).var(dtype=np.float64))
            found["critic/explained_variance"] = 1.0 - left / spread if spread else None
        return found


def choices(recipe: Recipe) -> tuple[list[str], list[str]]:
    """What a user should know of the algorithm that the recipe chooses: notices, and warnings."""
    algorithm = recipe.trainer.algorithm
    notices, warnings = [], []
    if algorithm.needs_whole_batch is not None:
        notices.append(f"training begins when a step's last group is there: {algorithm.needs_whole_batch}")
    if algorithm.kl_coef and algorithm.kl_in == "loss" and algorithm.kl_estimator == "k1":
        warnings.append(
            "trainer.algorithm.kl_estimator=k1 in the loss has an expected gradient of 0 on policy: it restrains "
            "nothing. Use k2, k3 or low_var_kl, or kl_in=reward"
        )
    if algorithm.shaping.turn_bonus and algorithm.shaping.turn_bonus_cap is None:
        warnings.append(
            "trainer.algorithm.shaping.turn_bonus without turn_bonus_cap: a wrong answer gets cheaper with each turn, "
            "and a policy may learn to call tools without end (docs/algorithms.md)"
        )
    return notices, warnings


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
