"""A fork, and a rewritten history, share nothing that changes with the trajectory they come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from enum import Enum
from typing import Any

import pytest

from agentloop.agent.base import AgentLoop
from agentloop.agent.runner import EpisodeRunner
from agentloop.config import SamplingConfig
from agentloop.episode.branch import Branch, BranchMetrics
from agentloop.episode.episode import Episode
from agentloop.episode.shared import Shared
from agentloop.types import EpisodeStatus, Task

SHARED_ON_PURPOSE = {"tools", "before"}
"""Fields of a branch that forks may share: schemas are replaced as a whole; `before` is another branch."""

USED_TOGETHER = {
    "task",
    "renderer",
    "generator",
    "session",
    "interaction",
    "images",
    "budget",
    "pacer",
    "config",
    "sampling",
    "recorder",
}
"""Objects of `Shared` that all branches use on purpose; everything else in it cannot change."""


def immutable(value: object) -> bool:
    return value is None or isinstance(value, str | int | float | bool | tuple | frozenset | Enum)


def mutable_parts(value: Any) -> dict[str, Any]:
    """The mutable attributes of a branch, and one level deeper those of its ledger and metrics."""
    found = {}
    names = value.__slots__ if hasattr(value, "__slots__") else vars(value)
    for name in names:
        entry = getattr(value, name)
        if immutable(entry) or name in SHARED_ON_PURPOSE:
            continue
        found[name] = entry
        if name in ("ledger", "metrics"):
            found |= {f"{name}.{key}": part for key, part in mutable_parts(entry).items()}
    return found


@pytest.mark.parametrize("how", ["fork with its past", "fork from messages", "rewrite"])
async def test_no_mutable_attribute_is_shared_between_branches(
    make_runner: Callable[..., EpisodeRunner], turn: Callable[[str], list[int]], task: Task, how: str
) -> None:
    pairs: list[tuple[Episode, Episode]] = []

    class Forks(AgentLoop):
        async def run(self, episode: Episode) -> None:
            await episode.generate()
            episode.add_reward("step", 1.0)
            if how == "rewrite":
                episode.rewrite([{"role": "user", "content": "So far: 408."}])
                closed = episode._branch.forks[0]
                pairs.append((episode, Episode(episode._shared, closed)))
            else:
                messages: Any = None if how == "fork with its past" else [{"role": "user", "content": "Begin."}]
                pairs.append((episode, episode.fork(messages)))

    [trajectory] = await make_runner([turn("#### 408<|im_end|>")], agents={"tool_agent": Forks}).run(
        task, group_id="g", sample_index=0, sampling=SamplingConfig(max_new_tokens=50)
    )
    assert trajectory.status is EpisodeStatus.OK, trajectory.error

    [(one, other)] = pairs
    # An episode has no state beside these two, so that whatever is added has to be added to one of them.
    assert set(vars(one)) == set(vars(other)) == {"_shared", "_branch"}
    assert one._shared is other._shared and one._branch is not other._branch
    ours, theirs = mutable_parts(one._branch), mutable_parts(other._branch)
    assert {"messages", "images", "pending", "ledger", "ledger._token_ids", "forks", "step_rewards"} <= set(ours)
    shared = [name for name in ours if ours[name] is theirs.get(name)]
    assert not shared, f"a fork shares {shared}: give them anew in Branch.fork and Branch.rewrite"


def test_what_branches_share_cannot_be_replaced() -> None:
    assert Shared.__dataclass_params__.frozen  # type: ignore[attr-defined]  # the standard library does not type it
    plain = {"seed": "int | None", "group_id": "str", "sample_index": "int"}
    assert {f.name: f.type for f in dataclasses.fields(Shared) if f.name not in USED_TOGETHER} == plain


def test_a_metric_that_was_not_measured_is_not_there() -> None:
    assert "interaction_s" not in BranchMetrics().as_dict()
    assert BranchMetrics(interaction_s=0.0).as_dict()["interaction_s"] == 0.0
    branch = Branch(messages=[], tools=None, images=[])
    branch.fork(None)
    assert branch.metrics.as_dict()["forks"] == 1.0
