"""Turn finished groups into training samples with advantages."""

from __future__ import annotations

import base64
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agentloop.config import AlgorithmConfig, ShapingConfig
from agentloop.images import image_data
from agentloop.types import EpisodeStatus, Trajectory
from trainer.algorithms.advantage import advantages, discounted_returns, gae, grpo_process, remax
from trainer.algorithms.shaping import overlong_penalty, wrong_answer
from trainer.rollouts.producer import Group
from trainer.types import TrainSample

KEYS_OF_GROUP = 40
"""Low bits of a `group_key` that hold the group's index; higher bits number its prompts."""

ResponseLimit = Callable[[str], int]
"""`max_response_tokens` by agent name."""


@dataclass(slots=True)
class TrainEpisode:
    """A trainable episode: its trajectories, their samples, and quantities of their tokens.

    Attributes:
        kept: the trajectories, the main one last.
        samples: parallel to `kept`; advantages are 0 until `set_advantages`.
        reward: the shaped reward; `set_advantages` subtracts the KL penalties.
        added: what shaping added to the reward.
        penalties: for each sample (L), subtracted from each token's reward; None: no penalty.
        values: for each sample (L), the critic's values; None: no critic.
        returns: for each sample (L), the critic's targets, set together with the advantages.
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
    """The trainable episodes of a group; `baseline` is the shaped reward of its greedy episode."""

    group: Group
    episodes: list[TrainEpisode]
    baseline: float | None = None

    @property
    def samples(self) -> list[TrainSample]:
        return [sample for episode in self.episodes for sample in episode.samples]


def collect(
    group: Group,
    shaping: ShapingConfig | None = None,
    limit: ResponseLimit = lambda _: 0,
    image_token: int | None = None,
) -> TrainGroup:
    """Make samples of a group's trainable trajectories, without advantages yet.

    Failed and rejected episodes are left out before a baseline is taken: an infrastructure failure
    says nothing about the policy. The trajectories of a forked episode share its reward. Each gets
    the weight 1 / (number of them), in loss and normalizer, so that the episode counts as much as
    one with a single trajectory.

    Args:
        shaping: reward shaping; None: rewards stay as they are.
        limit: response limit of an agent, read by overlong shaping.
        image_token: the placeholder of images. None: unknown, so that prompts are shared only by
            trajectories with equal images throughout.
    """
    prompts: dict[tuple[bytes, ...], int] = {}
    files: dict[int, np.ndarray] = {}

    episodes = []
    for kept in filter(None, map(_usable, group.episodes)):
        samples = []
        for trajectory in kept:
            token_ids = np.asarray(trajectory.token_ids, dtype=np.int32)
            loss_mask = np.asarray(trajectory.loss_mask, dtype=bool)
            logprobs = np.asarray(trajectory.logprobs, dtype=np.float32)  # None is NaN
            images = tuple(_file(image, files) for image in trajectory.images)

            # A fork's prompt differs from the group's, and a loop may change its own. Samples with
            # equal keys share one computed prompt, so the key comes from the prompt itself.
            start = token_ids[: trajectory.prompt_length]
            shown = images if image_token is None else images[: _image_count(start, image_token)]
            key = (start.tobytes(), *(image.tobytes() for image in shown))
            prompt = prompts.setdefault(key, len(prompts))
            samples.append(
                TrainSample(
                    token_ids=token_ids,
                    loss_mask=loss_mask,
                    old_logprobs=np.where(loss_mask, logprobs, np.float32(0.0)),
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


def _image_count(ids: np.ndarray, image_token: int) -> int:
    """Return the number of images in ids: runs of placeholders."""
    places = ids == image_token
    return int(np.count_nonzero(places[1:] & ~places[:-1])) + int(np.count_nonzero(places[:1]))


def _file(image: Any, files: dict[int, np.ndarray]) -> np.ndarray:
    """Return the bytes sent to the rollout server: one array for each image object of a group."""
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
    """Return what shaping adds to an episode's reward; the main trajectory's length counts."""
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


def set_advantages(batch: TrainGroup, algorithm: AlgorithmConfig) -> None:
    """Write a group's advantages, not whitened yet, into its samples; with a critic also `returns`.

    A group whose greedy episode failed has no baseline and therefore no advantages: its episodes
    are removed.
    """
    for episode in batch.episodes:
        if episode.penalties is not None:
            episode.reward -= math.fsum(float(column.sum()) for column in episode.penalties)

    if not batch.episodes:
        return
    if algorithm.needs.step_rewards:
        _set_process_advantages(batch.episodes)
    elif algorithm.needs.token_rewards:
        for episode in batch.episodes:
            _set_token_advantages(episode, algorithm)
    elif algorithm.needs.greedy_episode and batch.baseline is None:
        batch.episodes = []
    else:
        _set_outcome_advantages(batch, algorithm)


def _set_outcome_advantages(batch: TrainGroup, algorithm: AlgorithmConfig) -> None:
    """Give all sampled tokens of an episode one advantage, from its reward and a baseline."""
    rewards = np.array([episode.reward for episode in batch.episodes], dtype=np.float64)
    if algorithm.needs.greedy_episode:
        assert batch.baseline is not None
        outcomes = remax(rewards, batch.baseline)
    else:
        outcomes = advantages(rewards, algorithm.advantage)

    for episode, outcome in zip(batch.episodes, outcomes, strict=True):
        for sample in episode.samples:
            sample.advantages[sample.loss_mask] = outcome


def _set_process_advantages(episodes: Sequence[TrainEpisode]) -> None:
    """Apply `advantage.grpo_process` to a group.

    Steps are ordered as their turns were generated, over all trajectories of a forked episode, so
    that a token gets the rewards of its own turn and of everything that came after it. The reward
    function's number is the reward of a last step, which ends with the episode. In an episode
    without step rewards, the reward is its only step; in a group without any step rewards this
    equals `grpo`. Without a reward function, turns after the last rewarded one get 0.
    """
    steps_of_episodes = [_steps(episode) for episode in episodes]
    values = grpo_process([[value for _, value in steps] for steps in steps_of_episodes])

    for episode, steps, of_steps in zip(episodes, steps_of_episodes, values, strict=True):
        keys = [key for key, _ in steps]
        ahead = [*of_steps.tolist(), 0.0]
        for trajectory, sample in zip(episode.kept, episode.samples, strict=True):
            for turn in trajectory.turns:
                sample.advantages[turn.start : turn.end] = ahead[bisect_left(keys, (turn.order, turn.end))]


def _steps(episode: TrainEpisode) -> list[tuple[tuple[float, int], float]]:
    """Return an episode's steps as ((generation order, end), reward), in order."""
    steps: list[tuple[tuple[float, int], float]] = []
    for trajectory in episode.kept:
        orders = {(turn.start, turn.end): turn.order for turn in trajectory.turns}
        steps += [((orders[r.start, r.end], r.end), r.value) for r in trajectory.step_rewards]
    steps.sort(key=lambda step: step[0])

    last = episode.kept[-1]
    if last.outcome is not None or not steps:
        steps.append(((math.inf, 0), _reward(episode.kept) if last.outcome is None else last.outcome))
    steps[-1] = (steps[-1][0], steps[-1][1] + episode.added)
    return steps


def _set_token_advantages(episode: TrainEpisode, algorithm: AlgorithmConfig) -> None:
    """Set returns or generalized advantages over the sampled tokens, in generation order.

    The trajectories of a forked episode are one sequence of decisions: what a sub-agent sampled is
    followed by what was generated after it, in whichever trajectory that is.
    """
    stream = _SampledStream(episode)
    rewards = _token_rewards(episode, stream)
    columns = [sample.advantages for sample in episode.samples]
    if not algorithm.needs.critic:
        stream.write(discounted_returns(rewards, algorithm.gamma), columns)
        return

    assert episode.values is not None, "values are computed before the advantages"
    values = stream.read(episode.values)
    found = gae(rewards, values, algorithm.gamma, algorithm.lam)
    stream.write(found, columns)
    episode.returns = [np.zeros(len(sample), dtype=np.float32) for sample in episode.samples]
    stream.write(found + values, episode.returns)


def _token_rewards(episode: TrainEpisode, stream: _SampledStream) -> np.ndarray:
    """Return the reward of each token of the stream, float64.

    A step reward belongs to the last token of its turn, the reward function's number to the last
    token of the episode; without either, the last token gets the episode's reward.
    """
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
    return rewards


class _SampledStream:
    """The sampled tokens of an episode's samples as one sequence, in generation order."""

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
        """Return the stream index of the last token of sample `number` at or before `position`."""
        candidates = np.flatnonzero((self._number == number) & (self._position <= position))
        return int(candidates[-1])

    def read(self, columns: Sequence[np.ndarray]) -> np.ndarray:
        """Gather one number for each token of the stream from per-sample columns, float64."""
        result = np.zeros(len(self), dtype=np.float64)
        for k, column in enumerate(columns):
            rows = self._number == k
            result[rows] = column[self._position[rows]]
        return result

    def write(self, numbers: np.ndarray, columns: Sequence[np.ndarray]) -> None:
        """Scatter one number for each token of the stream into per-sample columns."""
        for k, column in enumerate(columns):
            rows = self._number == k
            column[self._position[rows]] = numbers[rows]
