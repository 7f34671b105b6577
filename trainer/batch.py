"""From finished groups to what the worker trains on, and to the numbers of a step."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from agentloop.types import EpisodeStatus, Trajectory
from trainer.advantage import advantages
from trainer.producer import Group
from trainer.types import TrainSample


def train_samples(group: Group, estimator: str) -> list[TrainSample]:
    """The trainable trajectories of a group with their advantages.

    Failed and rejected episodes are left out before the baseline is taken: a failure of the machinery says nothing
    about the policy. The trajectories of a forked episode share its reward and weigh together as one episode.
    """
    usable = [
        (episode, kept)
        for episode in group.episodes
        if (kept := [t for t in episode if t.status is EpisodeStatus.OK and t.sampled_tokens and t.reward is not None])
    ]
    if not usable:
        return []
    rewards = np.array([kept[-1].reward for _, kept in usable], dtype=np.float64)
    samples = []
    for (_, kept), advantage in zip(usable, advantages(rewards, estimator), strict=True):
        for trajectory in kept:
            mask = np.asarray(trajectory.loss_mask, dtype=bool)
            samples.append(
                TrainSample(
                    token_ids=np.asarray(trajectory.token_ids, dtype=np.int64),
                    loss_mask=mask,
                    old_logprobs=np.array([lp or 0.0 for lp in trajectory.logprobs], dtype=np.float32),
                    advantages=np.where(mask, np.float32(advantage), np.float32(0.0)),
                    prompt_length=trajectory.prompt_length,
                    group_key=group.index,
                    weight=1.0 / len(kept),
                )
            )
    return samples


def episode_metrics(groups: Sequence[Group], version: int) -> dict[str, Any]:
    """Numbers of a step's episodes; the keys are those of DESIGN section 6.

    Args:
        version: the policy version the step trains; staleness is counted from it.
    """
    trajectories = [t for group in groups for t in group.trajectories]
    last = [episode[-1] for group in groups for episode in group.episodes if episode]
    rewards = [t.reward for t in last if t.status is EpisodeStatus.OK and t.reward is not None]
    sampled = sum(t.sampled_tokens for t in trajectories)
    lengths = [t.response_length for t in trajectories]
    oldest = [v for t in trajectories if t.status is EpisodeStatus.OK and (v := t.min_version) is not None]
    metrics: dict[str, Any] = {
        "reward/mean": statistics.fmean(rewards) if rewards else None,
        "reward/std": statistics.pstdev(rewards) if rewards else None,
        "episode/count": len(last),
        "episode/turns_mean": _mean(len(t.turns) for t in last),
        "episode/tool_calls_mean": _mean(t.metrics.get("tool_calls", 0.0) for t in last),
        "episode/tool_errors_mean": _mean(t.metrics.get("tool_errors", 0.0) for t in last),
        "episode/malformed_calls_mean": _mean(t.metrics.get("malformed_calls", 0.0) for t in last),
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
    return metrics


def eval_metrics(episodes: Sequence[Sequence[Trajectory]]) -> dict[str, Any]:
    """Mean reward of an evaluation over the episodes that did not fail, and how many failed."""
    last = [episode[-1] for episode in episodes if episode]
    rewards = [t.reward for t in last if t.status is EpisodeStatus.OK and t.reward is not None]
    return {
        "eval/reward_mean": statistics.fmean(rewards) if rewards else None,
        "eval/episodes": len(last),
        "eval/failed": sum(t.status is not EpisodeStatus.OK for t in last),
        "eval/tool_calls_mean": _mean(t.metrics.get("tool_calls", 0.0) for t in last),
        "eval/response_tokens_mean": _mean(t.response_length for t in last),
    }


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
