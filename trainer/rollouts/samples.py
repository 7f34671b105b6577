"""From a finished group to samples: who is trained, and with what advantage. No torch."""

from __future__ import annotations

import base64
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agentloop.chat.images import image_data
from agentloop.config import AlgorithmConfig, ShapingConfig
from agentloop.types import EpisodeStatus, Trajectory
from trainer.algorithms.advantage import advantages, discounted_returns, gae, grpo_process, remax
from trainer.algorithms.shaping import overlong_penalty, wrong_answer
from trainer.rollouts.producer import Group
from trainer.types import TrainSample

KEYS_OF_GROUP = 40
"""Bits of a `group_key` that hold the group's index; those above tell the prompts of one group apart."""

ResponseLimit = Callable[[str], int]
"""`max_response_tokens` by agent name."""


@dataclass(slots=True)
class TrainEpisode:
    """A trainable episode: its trajectories, one sample for each, and what is said of their tokens later.

    Attributes:
        kept: its trajectories, the main one last.
        samples: parallel to `kept`; advantages are 0 until `set_advantages`.
        reward: shaped, and less the KL penalty, once those are known.
        added: what shaping has added to the reward.
        penalties: for each sample (L) what is taken from each token's reward; None: nothing.
        values: for each sample (L) the critic's values; None: no critic.
        returns: for each sample (L) the critic's targets, set with the advantages.
    """

    kept: list[Trajectory]
    samples: list[TrainSample]
    reward: float
    added: float = 0.0
    penalties: list[np.ndarray] | None = None
    values: list[np.ndarray] | None = None
    returns: list[np.ndarray] | None = None


@dataclass(slots=True)
class TrainGroup:
    """The trainable episodes of a group. `baseline`: the reward of its greedy episode, shaped, if there is one."""

    group: Group
    episodes: list[TrainEpisode]
    baseline: float | None = None

    @property
    def samples(self) -> list[TrainSample]:
        return [sample for episode in self.episodes for sample in episode.samples]


def collect(group: Group, shaping: ShapingConfig | None = None, limit: ResponseLimit = lambda _: 0) -> TrainGroup:
    """The trainable trajectories of a group, without advantages yet.

    Failed and rejected episodes are left out before a baseline is taken: a failure of the machinery says nothing about
    the policy. The trajectories of a forked episode share its reward; each has the weight 1 / (how many they are), in
    loss and normalizer, so that the episode counts as one trajectory does.
    """
    prompts: dict[tuple[bytes, ...], int] = {}
    files: dict[int, np.ndarray] = {}
    episodes = []
    for kept in filter(None, map(_usable, group.episodes)):
        samples = []
        for trajectory in kept:
            token_ids = np.asarray(trajectory.token_ids, dtype=np.int64)
            loss_mask = np.asarray(trajectory.loss_mask, dtype=bool)
            logprobs = np.asarray(trajectory.logprobs, dtype=np.float64)  # None is NaN
            images = tuple(_file(image, files) for image in trajectory.images)
            # A fork's prompt is not that of the group, and a loop may change its own: equal keys need equal prompts.
            key = (token_ids[: trajectory.prompt_length].tobytes(), *(image.tobytes() for image in images))
            prompt = prompts.setdefault(key, len(prompts))
            samples.append(
                TrainSample(
                    token_ids=token_ids,
                    loss_mask=loss_mask,
                    old_logprobs=np.where(loss_mask, logprobs, 0.0).astype(np.float32),
                    advantages=np.zeros(len(token_ids), dtype=np.float32),
                    prompt_length=trajectory.prompt_length,
                    group_key=group.index + (prompt << KEYS_OF_GROUP),
                    weight=1.0 / len(kept),
                    images=images,
                )
            )
        added = _shaped(kept, shaping, limit) if shaping is not None else 0.0
        episodes.append(TrainEpisode(kept, samples, _reward(kept) + added, added))
    baseline = None
    if group.baseline and (kept := _usable(group.baseline)):
        baseline = _reward(kept) + (_shaped(kept, shaping, limit) if shaping is not None else 0.0)
    return TrainGroup(group, episodes, baseline)


def _file(image: Any, files: dict[int, np.ndarray]) -> np.ndarray:
    """The bytes of an image as the rollout server got them; one array for each image object of a group."""
    if id(image) not in files:
        files[id(image)] = np.frombuffer(base64.b64decode(image_data(image)), dtype=np.uint8)
    return files[id(image)]


def _usable(episode: Sequence[Trajectory]) -> list[Trajectory]:
    return [t for t in episode if t.status is EpisodeStatus.OK and t.sampled_tokens and t.reward is not None]


def _reward(kept: Sequence[Trajectory]) -> float:
    reward = kept[-1].reward
    assert reward is not None
    return reward


def _shaped(kept: Sequence[Trajectory], shaping: ShapingConfig, limit: ResponseLimit) -> float:
    """What shaping adds to the reward of an episode; the length that counts is that of its main trajectory."""
    main, reward = kept[-1], _reward(kept)
    added = 0.0
    if shaping.wrong_reward is not None and reward <= 0:
        turns = sum(len(trajectory.turns) for trajectory in kept)
        added = wrong_answer(turns, shaping.wrong_reward, shaping.turn_bonus, shaping.turn_bonus_cap) - reward
    if shaping.overlong_buffer is not None:
        added += overlong_penalty(
            main.response_length, limit(main.agent_name), shaping.overlong_buffer, shaping.overlong_penalty
        )
    return added


def train_samples(group: Group, estimator: str) -> list[TrainSample]:
    """The samples of a group under an estimator that needs no more than the group."""
    batch = collect(group)
    set_advantages(batch, AlgorithmConfig.model_validate({"advantage": estimator}))
    return batch.samples


def set_advantages(batch: TrainGroup, algorithm: AlgorithmConfig) -> None:
    """Write the advantages of a group into its samples (and, with a critic, `returns`); whitening comes later.

    A group whose greedy episode failed has no baseline and so no advantages: its episodes are left out.
    """
    for episode in batch.episodes:
        if episode.penalties is not None:
            episode.reward -= math.fsum(float(column.sum()) for column in episode.penalties)
    kind = algorithm.advantage
    if not batch.episodes:
        return
    if kind == "grpo_process":
        _set_process_advantages(batch.episodes)
    elif kind in ("reinforce_pp", "gae"):
        for episode in batch.episodes:
            _set_token_advantages(episode, algorithm)
    else:
        rewards = np.array([episode.reward for episode in batch.episodes], dtype=np.float64)
        if kind != "remax":
            outcomes = advantages(rewards, kind)
        elif batch.baseline is None:
            batch.episodes = []
            return
        else:
            outcomes = remax(rewards, batch.baseline)
        for episode, outcome in zip(batch.episodes, outcomes, strict=True):
            for sample in episode.samples:
                sample.advantages[sample.loss_mask] = outcome


def _set_process_advantages(episodes: Sequence[TrainEpisode]) -> None:
    """`advantage.grpo_process` of a group.

    Steps are ordered as their turns were generated, over all trajectories of a forked episode, so that a token has the
    rewards of its own turn and of all that came after it. The reward function's number is the reward of a last step,
    which ends with the episode. In an episode without step rewards the reward, whatever it came from, is its only step:
    in a group without any, this is `grpo`. Without a reward function, turns after the last rewarded one have 0.
    """
    steps_of_episodes = []
    for episode in episodes:
        steps: list[tuple[tuple[float, int], float]] = []
        for trajectory in episode.kept:
            orders = {(turn.start, turn.end): turn.order for turn in trajectory.turns}
            steps += [((orders[r.start, r.end], r.end), r.value) for r in trajectory.step_rewards]
        steps.sort(key=lambda step: step[0])
        last = episode.kept[-1]
        if last.outcome is not None or not steps:
            steps.append(((math.inf, 0), _reward(episode.kept) if last.outcome is None else last.outcome))
        steps[-1] = (steps[-1][0], steps[-1][1] + episode.added)
        steps_of_episodes.append(steps)
    values = grpo_process([[value for _, value in steps] for steps in steps_of_episodes])
    for episode, steps, of_steps in zip(episodes, steps_of_episodes, values, strict=True):
        keys = [key for key, _ in steps]
        ahead = [*of_steps.tolist(), 0.0]
        for trajectory, sample in zip(episode.kept, episode.samples, strict=True):
            for turn in trajectory.turns:
                sample.advantages[turn.start : turn.end] = ahead[bisect_left(keys, (turn.order, turn.end))]


def _set_token_advantages(episode: TrainEpisode, algorithm: AlgorithmConfig) -> None:
    """Returns or generalized advantages over the episode's sampled tokens, in the order in which they were sampled.

    A step reward stands at the last token of its turn, the reward function's number at the last token of the episode;
    without either, the reward does. Trajectories of a forked episode are one sequence of decisions: what a sub-agent
    sampled is followed by what was generated after it, wherever that stands.
    """
    stream = _SampledStream(episode)
    rewards = np.zeros(len(stream), dtype=np.float64)
    steps = [(k, reward) for k, trajectory in enumerate(episode.kept) for reward in trajectory.step_rewards]
    for k, reward in steps:
        rewards[stream.place(k, reward.end - 1)] += reward.value
    last = episode.kept[-1]
    if last.outcome is not None or not steps:
        rewards[-1] += _reward(episode.kept) if last.outcome is None else last.outcome
    rewards[-1] += episode.added
    if episode.penalties is not None:
        rewards -= stream.read(episode.penalties)
    if algorithm.advantage == "reinforce_pp":
        stream.write(discounted_returns(rewards, algorithm.gamma), [s.advantages for s in episode.samples])
        return
    assert episode.values is not None, "the critic comes first"
    values = stream.read(episode.values)
    found = gae(rewards, values, algorithm.gamma, algorithm.lam)
    stream.write(found, [s.advantages for s in episode.samples])
    episode.returns = [np.zeros(len(s), dtype=np.float32) for s in episode.samples]
    stream.write(found + values, episode.returns)


class _SampledStream:
    """The sampled tokens of an episode's samples as one sequence, by the order of their generations."""

    def __init__(self, episode: TrainEpisode) -> None:
        numbers, positions, orders = [], [], []
        for k, (trajectory, sample) in enumerate(zip(episode.kept, episode.samples, strict=True)):
            order = np.zeros(len(sample), dtype=np.int64)
            for turn in trajectory.turns:
                order[turn.start : turn.end] = turn.order
            sampled = np.flatnonzero(sample.loss_mask)
            numbers.append(np.full(len(sampled), k))
            positions.append(sampled)
            orders.append(order[sampled])
        number, position = np.concatenate(numbers), np.concatenate(positions)
        ranking = np.lexsort((position, number, np.concatenate(orders)))
        self._number, self._position = number[ranking], position[ranking]

    def __len__(self) -> int:
        return len(self._number)

    def place(self, number: int, position: int) -> int:
        """Where in the stream the last sampled token of a sample at or before `position` is."""
        candidates = np.flatnonzero((self._number == number) & (self._position <= position))
        return int(candidates[-1])

    def read(self, columns: Sequence[np.ndarray]) -> np.ndarray:
        """The numbers of the sampled tokens, float64."""
        result = np.zeros(len(self), dtype=np.float64)
        for k, column in enumerate(columns):
            rows = self._number == k
            result[rows] = column[self._position[rows]]
        return result

    def write(self, numbers: np.ndarray, columns: Sequence[np.ndarray]) -> None:
        """Put numbers of the sampled tokens back where they are."""
        for k, column in enumerate(columns):
            rows = self._number == k
            column[self._position[rows]] = numbers[rows]
