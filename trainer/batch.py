"""From finished groups to what the worker trains on, and to the numbers of a step."""

from __future__ import annotations

import base64
import math
import statistics
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from agentloop.chat.images import image_data
from agentloop.types import EpisodeStatus, Trajectory
from trainer.advantage import advantages, grpo_process
from trainer.producer import Group
from trainer.types import TrainSample

KEYS_OF_GROUP = 40
"""Bits of a `group_key` that hold the group's index; those above tell the prompts of one group apart."""


def train_samples(group: Group, estimator: str) -> list[TrainSample]:
    """The trainable trajectories of a group with their advantages.

    Failed and rejected episodes are left out before the baseline is taken: a failure of the machinery says nothing
    about the policy. The trajectories of a forked episode share its reward; each has the weight 1 / (how many they
    are), in loss and normalizer, so that the episode counts as one trajectory does.
    """
    usable = [
        kept
        for episode in group.episodes
        if (kept := [t for t in episode if t.status is EpisodeStatus.OK and t.sampled_tokens and t.reward is not None])
    ]
    if not usable:
        return []
    if estimator == "grpo_process":
        by_token = _process_advantages(usable)
    else:
        outcomes = advantages(np.array([kept[-1].reward for kept in usable], dtype=np.float64), estimator)
        by_token = [[_everywhere(t, value) for t in kept] for kept, value in zip(usable, outcomes, strict=True)]
    prompts: dict[tuple[bytes, ...], int] = {}
    files: dict[int, np.ndarray] = {}
    samples = []
    for kept, columns in zip(usable, by_token, strict=True):
        for trajectory, column in zip(kept, columns, strict=True):
            token_ids = np.asarray(trajectory.token_ids, dtype=np.int64)
            images = tuple(_file(image, files) for image in trajectory.images)
            # A fork's prompt is not that of the group, and a loop may change its own: equal keys need equal prompts.
            key = (token_ids[: trajectory.prompt_length].tobytes(), *(image.tobytes() for image in images))
            prompt = prompts.setdefault(key, len(prompts))
            samples.append(
                TrainSample(
                    token_ids=token_ids,
                    loss_mask=np.asarray(trajectory.loss_mask, dtype=bool),
                    old_logprobs=np.array([lp or 0.0 for lp in trajectory.logprobs], dtype=np.float32),
                    advantages=column,
                    prompt_length=trajectory.prompt_length,
                    group_key=group.index + (prompt << KEYS_OF_GROUP),
                    weight=1.0 / len(kept),
                    images=images,
                )
            )
    return samples


def _file(image: Any, files: dict[int, np.ndarray]) -> np.ndarray:
    """The bytes of an image as the rollout server got them; one array for each image object of a group."""
    if id(image) not in files:
        files[id(image)] = np.frombuffer(base64.b64decode(image_data(image)), dtype=np.uint8)
    return files[id(image)]


def _everywhere(trajectory: Trajectory, advantage: float) -> np.ndarray:
    """(L) float32: an episode's advantage on all of its sampled tokens."""
    return np.where(np.asarray(trajectory.loss_mask, dtype=bool), np.float32(advantage), np.float32(0.0))


def _process_advantages(usable: Sequence[Sequence[Trajectory]]) -> list[list[np.ndarray]]:
    """`advantage.grpo_process` of a group: for each trajectory of each episode (L) float32, 0 where the mask is 0.

    Steps are ordered as their turns were generated, over all trajectories of a forked episode, so that a token has the
    rewards of its own turn and of all that came after it. The reward function's number is the reward of a last step,
    which ends with the episode. In an episode without step rewards the reward, whatever it came from, is its only step:
    in a group without any, this is `grpo`. Without a reward function, turns after the last rewarded one have 0.
    """
    steps_of_episodes = []
    for kept in usable:
        steps: list[tuple[tuple[float, int], float]] = []
        for trajectory in kept:
            orders = {(turn.start, turn.end): turn.order for turn in trajectory.turns}
            steps += [((orders[r.start, r.end], r.end), r.value) for r in trajectory.step_rewards]
        steps.sort(key=lambda step: step[0])
        last = kept[-1]
        if last.outcome is not None or not steps:
            steps.append(((math.inf, 0), last.reward if last.outcome is None else last.outcome))
        steps_of_episodes.append(steps)
    values = grpo_process([[value for _, value in steps] for steps in steps_of_episodes])
    result = []
    for kept, steps, of_steps in zip(usable, steps_of_episodes, values, strict=True):
        keys = [key for key, _ in steps]
        ahead = [*of_steps.tolist(), 0.0]
        columns = [np.zeros(len(trajectory), dtype=np.float32) for trajectory in kept]
        for trajectory, column in zip(kept, columns, strict=True):
            for turn in trajectory.turns:
                column[turn.start : turn.end] = ahead[bisect_left(keys, (turn.order, turn.end))]
        result.append(columns)
    return result


def episode_metrics(groups: Sequence[Group], version: int) -> dict[str, Any]:
    """Numbers of a step's episodes; the keys are those of DESIGN section 6.

    Args:
        version: the policy version the step trains; staleness is counted from it.
    """
    trajectories = [t for group in groups for t in group.trajectories]
    episodes = [episode for group in groups for episode in group.episodes if episode]
    last = [episode[-1] for episode in episodes]
    rewards = [t.reward for t in last if t.status is EpisodeStatus.OK and t.reward is not None]
    sampled = sum(t.sampled_tokens for t in trajectories)
    lengths = [t.response_length for t in trajectories]
    oldest = [v for t in trajectories if t.status is EpisodeStatus.OK and (v := t.min_version) is not None]

    def per_episode(key: str) -> float:
        return _mean(sum(t.metrics.get(key, 0.0) for t in episode) for episode in episodes)

    metrics: dict[str, Any] = {
        "reward/mean": statistics.fmean(rewards) if rewards else None,
        "reward/std": statistics.pstdev(rewards) if rewards else None,
        "episode/count": len(last),
        "episode/turns_mean": _mean(sum(len(t.turns) for t in episode) for episode in episodes),
        "episode/user_turns_mean": per_episode("user_turns"),
        "episode/tool_calls_mean": per_episode("tool_calls"),
        "episode/tool_errors_mean": per_episode("tool_errors"),
        "episode/malformed_calls_mean": per_episode("malformed_calls"),
        "episode/response_tokens_mean": _mean(lengths),
        "episode/response_tokens_max": max(lengths, default=0),
        "episode/forks": len(trajectories) - len(last),
        "episode/failed": sum(t.status is EpisodeStatus.FAILED for t in last),
        "episode/rejected": sum(t.status is EpisodeStatus.REJECTED for t in last),
        "rollout/tokens": sampled,
        "staleness/max": max((version - v for v in oldest), default=0),
    }
    for reason, count in sorted(Counter(t.stop_reason.value for t in last).items()):
        metrics[f"stop/{reason}"] = count
    for rule, count in sorted(Counter(t.broken_rule for t in last if t.broken_rule is not None).items()):
        metrics[f"rejected/{rule}"] = count
    return metrics


def failure_causes(trajectories: Iterable[Trajectory], limit: int = 3) -> list[str]:
    """The first distinct reasons why episodes failed or were rejected."""
    causes: list[str] = []
    for trajectory in trajectories:
        if trajectory.status is not EpisodeStatus.OK:
            cause = f"{trajectory.status.value} (row {trajectory.task_id}): {trajectory.error or 'no reason recorded'}"
            if trajectory.error not in [c.split(": ", 1)[1] for c in causes]:
                causes.append(cause)
        if len(causes) == limit:
            break
    return causes


def _mean(values: Iterable[float]) -> float:
    collected = list(values)
    return statistics.fmean(collected) if collected else 0.0
