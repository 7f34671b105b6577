"""Compute what samples need before the update: reference and proximal logprobs, values, advantages.

Groups are prepared chunk by chunk as they arrive. Whitening waits for the whole batch (`finish`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from agentloop.config import Recipe
from trainer.algorithms.advantage import whiten
from trainer.algorithms.kl import KlCoefficient, estimate
from trainer.rollouts.producer import Group
from trainer.rollouts.samples import TrainEpisode, TrainGroup, collect, set_advantages
from trainer.types import LossSpec, TrainSample, ValueSample
from trainer.workers.group import WorkerGroup


class BatchPreparation:
    """Prepare one step's groups for the trainer's ranks.

    Args:
        workers: the ranks, which compute logprobs and values.
        kl: the KL coefficient; its value at construction is used for the whole step.
        image_token: the placeholder of images; None: the model takes none.
    """

    def __init__(
        self, recipe: Recipe, workers: WorkerGroup, kl: KlCoefficient, *, image_token: int | None = None
    ) -> None:
        self._recipe = recipe
        self._algorithm = recipe.trainer.algorithm
        self._workers = workers
        self._image_token = image_token
        self._kl_coef = kl.value  # of this step; `kl` may be adapted at its end
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
        """Return the trainable episodes of a group, with shaped rewards."""
        shaping = self._algorithm.shaping
        batch = collect(
            group,
            shaping if shaping.chosen else None,
            lambda agent: self._recipe.agent(agent).max_response_tokens,
            self._image_token,
        )

        self._rewards += [episode.reward for episode in batch.episodes]
        if self._algorithm.needs.greedy_episode:
            self._without_baseline += batch.baseline is None
            self._baselines += [] if batch.baseline is None else [batch.baseline]
        return batch

    async def prepare(self, chunk: Sequence[TrainGroup]) -> None:
        """Set the advantages of the groups' samples, and the other columns that the loss reads."""
        episodes = [episode for batch in chunk for episode in batch.episodes]
        if not episodes:
            return
        algorithm = self._algorithm
        if algorithm.kl_coef and algorithm.kl_in == "reward":
            await self._set_penalties(episodes)
        if algorithm.correction.chosen and algorithm.minibatches > 1:
            await self._set_proximal(episodes)
        if algorithm.needs.critic:
            await self._set_values(episodes)

        # Last: advantages read the penalties and the values.
        for batch in chunk:
            set_advantages(batch, algorithm)

    async def _set_penalties(self, episodes: Sequence[TrainEpisode]) -> None:
        """Set each token's KL penalty against the reference."""
        temperature = self._recipe.rollout.sampling.temperature
        reference = await self._workers.logprobs(_samples(episodes), temperature=temperature, of="reference")
        columns = iter(reference)
        for episode in episodes:
            episode.penalties = []
            for sample in episode.samples:
                kl = estimate(self._algorithm.kl_estimator, sample.old_logprobs, next(columns))
                kl[~sample.loss_mask] = 0.0
                self._kl_sum += float(kl.sum())
                episode.penalties.append(self._kl_coef * kl)

    async def _set_proximal(self, episodes: Sequence[TrainEpisode]) -> None:
        """Set the trainer's own logprobs, before the first optimizer step changes them."""
        samples = _samples(episodes)
        proximal = await self._workers.logprobs(samples, temperature=self._recipe.rollout.sampling.temperature)
        for sample, column in zip(samples, proximal, strict=True):
            sample.proximal_logprobs = column

    async def _set_values(self, episodes: Sequence[TrainEpisode]) -> None:
        """Set the critic's values, before its first optimizer step changes them."""
        values = iter(await self._workers.values(_samples(episodes)))
        for episode in episodes:
            episode.values = [next(values) for _ in episode.samples]

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
        """Whiten the advantages of a whole batch, if the algorithm does."""
        if not self._algorithm.whitens:
            return
        samples = [sample for group in batch for sample in group.samples]
        columns = [sample.advantages[sample.loss_mask] for sample in samples]
        whitened = whiten(columns, [sample.weight for sample in samples])
        for sample, column in zip(samples, whitened, strict=True):
            sample.advantages[sample.loss_mask] = column

    @property
    def sums(self) -> dict[str, float]:
        """Sums that the ranks do not return: `kl_ref_sum` of a penalty in the reward."""
        return {"kl_ref_sum": self._kl_sum}

    @property
    def metrics(self) -> dict[str, float | None]:
        """The step's metrics that only some algorithms have."""
        found: dict[str, float | None] = {}
        if self._algorithm.kl_coef:
            found["train/kl_coef"] = self._kl_coef
        if self._algorithm.shaping.chosen:
            found["reward/shaped_mean"] = _mean(self._rewards)
        if self._algorithm.needs.greedy_episode:
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


def _samples(episodes: Sequence[TrainEpisode]) -> list[TrainSample]:
    return [sample for episode in episodes for sample in episode.samples]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
