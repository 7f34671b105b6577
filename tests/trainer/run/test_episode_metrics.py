"""What a step reports of its episodes."""

from __future__ import annotations

import pytest

from agentloop.types import EpisodeStatus, Span, StopReason, Trajectory
from tests.trainer.episodes import group, trajectory
from trainer.run.episode_metrics import AwayTools, episode_metrics, failure_causes, failures_text
from trainer.run.step import FailedStep, check_failures


def test_the_numbers_of_a_step() -> None:
    groups = [
        group([trajectory(1.0)], [trajectory(0.0, version=1)], [trajectory(None, EpisodeStatus.FAILED, version=0)]),
        group([trajectory(0.5), trajectory(0.5)]),
    ]
    metrics = episode_metrics(groups, version=2)
    assert metrics["reward/mean"] == pytest.approx(0.5)
    assert metrics["episode/count"] == 4 and metrics["episode/forks"] == 1
    assert metrics["episode/failed"] == 1 and metrics["episode/rejected"] == 0
    assert metrics["rollout/tokens"] == 10
    assert metrics["staleness/max"] == 1, "a failed episode is not trained, so it cannot be stale"
    assert metrics["stop/stop"] == 4 and metrics["episode/tool_calls_mean"] == 1.25
    assert metrics["episode/turns_mean"] == 2.5, "of all trajectories of an episode"


def test_rejected_episodes_are_counted_by_the_rule_they_break() -> None:
    rejected = [trajectory(None, EpisodeStatus.REJECTED) for _ in range(3)]
    for t, rule in zip(rejected, ["prompt", "trained_twice", "prompt"], strict=True):
        t.broken_rule = rule
    metrics = episode_metrics([group(*([t] for t in rejected), [trajectory(1.0)])], version=2)
    assert metrics["episode/rejected"] == 3
    assert {key: value for key, value in metrics.items() if key.startswith("rejected/")} == {
        "rejected/prompt": 2,
        "rejected/trained_twice": 1,
    }


def test_every_stop_reason_has_a_counter() -> None:
    ended = [trajectory(1.0) for _ in StopReason]
    for t, reason in zip(ended, StopReason, strict=True):
        t.stop_reason = reason
    metrics = episode_metrics([group(*([t] for t in ended))], version=2)
    assert all(metrics[f"stop/{reason.value}"] == 1 for reason in StopReason)


def test_an_empty_step_has_no_mean() -> None:
    metrics = episode_metrics([group([trajectory(None, EpisodeStatus.FAILED)])], version=0)
    assert metrics["reward/mean"] is None


def test_causes_are_listed_once_each_with_their_counts() -> None:
    failed = trajectory(None, EpisodeStatus.FAILED)
    rejected = trajectory(None, EpisodeStatus.REJECTED)
    assert failure_causes([failed, failed, trajectory(1.0), rejected]) == [
        "2x failed (row 7): failed on purpose",
        "1x rejected (row 7): rejected on purpose",
    ]


def test_causes_that_differ_in_numbers_are_one_and_a_long_list_is_cut() -> None:
    failed = [trajectory(None, EpisodeStatus.FAILED) for _ in range(30)]
    for number, t in enumerate(failed):
        t.error = f"row {number} is wrong" if number < 10 else f"cause {chr(87 + number)}"
    causes = failure_causes(failed, limit=3)
    assert causes[0] == "10x failed (row 7): row 0 is wrong" and len(causes) == 4
    assert causes[-1] == "18x other causes (18 kinds)"
    assert failures_text("2 of 4 failed", failed[:2]) == "2 of 4 failed: 2x failed (row 7): row 0 is wrong"
    assert failures_text("2 of 4 failed", failed[9:11]).count("\n  - 1x failed") == 2


def test_groups_with_equal_rewards_are_counted() -> None:
    groups = [
        group([trajectory(1.0)], [trajectory(1.0)]),
        group([trajectory(1.0)], [trajectory(0.0)]),
        group([trajectory(1.0)], [trajectory(None, EpisodeStatus.FAILED)]),  # nothing to compare with
    ]
    metrics = episode_metrics(groups, version=2)
    assert metrics["reward/zero_std_groups"] == 1 and metrics["reward/zero_std_share"] == 0.5
    assert episode_metrics(groups[2:], version=2)["reward/zero_std_share"] is None


def calling(*tools: str, away: str | None = None) -> list[Trajectory]:
    """An episode that called these tools; `away`: one that failed because this one was away."""
    made = trajectory(1.0) if away is None else trajectory(None, EpisodeStatus.FAILED)
    made.spans = [Span("episode", "0", None, 0, 1)]
    made.spans += [Span("tool", str(i), "0", 0, 1, attributes={"tool": name}) for i, name in enumerate(tools, 1)]
    if away is not None:
        made.spans.append(Span("tool", "9", "0", 0, 1, "error", "e", {"tool": away, "unavailable": True}))
    return [made]


def test_a_tool_that_is_away_counts_among_the_episodes_that_called_it() -> None:
    tools = AwayTools()
    for episode in (calling(), calling(), calling("look", "look"), calling("search"), calling(away="search")):
        tools.add(episode)
    assert tools.beyond(0.5) is None
    tools.add(calling("look", "search", away="search"))
    assert tools.beyond(0.5) == "2 of 3 episodes that called search failed because it was away"
    assert tools.beyond(0.7) is None


def test_a_step_without_the_tool_that_is_away_ends_the_run_although_most_episodes_went_on() -> None:
    warnings: list[str] = []
    on_their_own = [calling() for _ in range(14)]
    check_failures([group(*on_their_own, calling("search"), calling(away="search"))], 0.5, warnings.append)
    assert warnings[0].startswith("1 of 16 episodes failed")
    with pytest.raises(FailedStep) as ended:
        check_failures([group(*on_their_own, calling(away="search"), calling(away="search"))], 0.5, warnings.append)
    assert ended.value.message.startswith(
        "2 of 16 episodes of this step failed; 2 of 2 episodes that called search failed because it was away. Causes:\n"
    )
    with pytest.raises(FailedStep, match=r"^10 of 16 episodes of this step failed. Causes"):
        check_failures(
            [group(*[calling()] * 6, *[[trajectory(None, EpisodeStatus.FAILED)]] * 10)], 0.5, warnings.append
        )
