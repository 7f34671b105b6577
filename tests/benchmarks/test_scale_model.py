"""The capacity model against sums done by hand, and the simulation against what must hold in every run."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return lambda name: importlib.import_module(f"scale_{name}")


@pytest.fixture
def plan(part: Any) -> Any:
    costs = part("costs")
    return part("model").shortened(
        part("capacity").Plan(costs.WORKLOADS["tools"], costs.MODELS["0.5B"], costs.Assumed())
    )


def test_prompts_are_those_that_the_requests_of_an_episode_carry(part: Any) -> None:
    work = part("costs").Workload(turns=3, prompt=100, sampled=10, observed=5, tool_s=0.0)
    sizes = part("capacity").Sizes.of(work, 0)
    assert sizes.asked == 100 + 115 + 130
    assert (sizes.new, sizes.sampled, sizes.length) == (110, 30, 140)


def test_an_answer_is_streamed_only_if_it_is_longer_than_an_event(part: Any) -> None:
    work = part("costs").Workload(turns=2, prompt=1, sampled=128, observed=0, tool_s=0.0)
    assert [part("capacity").Sizes.of(work, every).events for every in (0, 64, 128)] == [0.0, 4.0, 0.0]


def test_a_part_is_as_busy_as_asked_at_the_gpus_that_the_model_names(plan: Any) -> None:
    for name in ("driver alone", "driver", "worker", "router"):
        gpus = plan.gpus_at(name, 0.7)
        assert plan.utilization(gpus)[name] == pytest.approx(0.7)
        assert [plan.needed(name, share * gpus) for share in (0.5, 0.99, 1.01, 2.99)] == [1, 1, 2, 3]


def test_ranks_wait_a_tenth_of_their_time_at_the_gpus_that_the_model_names(plan: Any) -> None:
    rates = plan.throughput(plan.ranks_wait_at(), workers=1)
    assert rates["trainer"] == pytest.approx(0.9 * rates["engine"])


def test_publishing_takes_a_tenth_of_a_step_at_the_gpus_that_the_model_names(plan: Any) -> None:
    gpus = plan.publish_at(8192, "broadcast")
    assert plan.publish_share(gpus, 8192, "broadcast") == pytest.approx(0.1, rel=0.01)
    assert plan.publish_share(gpus, 8192, "folder") > plan.publish_share(gpus, 8192, "broadcast")


def test_rollout_and_training_take_all_gpus_together(plan: Any) -> None:
    gpus = plan.gpus
    assert plan.demand(64)["episodes_s"] * (gpus.rollout_s + gpus.train_s) == pytest.approx(64)


def run(part: Any, plan: Any, **changes: Any) -> Any:
    given = {"gpus": 16, "groups": 32, "steps": 5, "workers": 4, "publish_s": 0.05}
    return part("simulation").Run(plan, **given | changes).simulate()


def test_every_episode_is_trained_once_and_none_too_late(part: Any, plan: Any) -> None:
    for staleness in (0, 1):
        result = run(part, plan, staleness=staleness)
        assert result.finished == len(result.trained) == 32 * 8 * 5
        assert set(result.trained) == {1}
        assert result.stale == staleness
        assert all(0 < share <= 1 for share in result.share.values())


def test_equal_seeds_give_equal_runs(part: Any, plan: Any) -> None:
    first, again, other = (run(part, plan, seed=seed, groups=8, steps=4) for seed in (1, 1, 2))
    assert first.rate == again.rate != other.rate
    assert first.waits == again.waits


def test_a_second_router_helps_where_one_is_full(part: Any, plan: Any) -> None:
    gpus = 2 * plan.gpus_at("router", 1.0)
    one, two = (run(part, plan, gpus=gpus, workers=16, groups=64, routers=count) for count in (1, 2))
    assert one.share["router"] > 0.9
    assert two.rate > 1.3 * one.rate
    assert two.wait("router", 0.5) < one.wait("router", 0.5)


def test_a_publish_stops_the_engine_and_costs_its_time(part: Any, plan: Any) -> None:
    free, paid = (run(part, plan, publish_s=seconds) for seconds in (0.0, 1.0))
    step_s = [32 * 8 / result.rate for result in (free, paid)]
    assert 0.8 <= step_s[1] - step_s[0] <= 1.2


def test_jobs_wait_only_while_all_processes_work(part: Any) -> None:
    simulation = part("simulation")
    clock = simulation.Clock()
    station, ended = simulation.Station(clock, 2), []
    for _ in range(4):
        station.ask(1.0, lambda: ended.append(clock.now))
    clock.run()
    assert ended == [1.0, 1.0, 2.0, 2.0]
    assert station.waits == [0.0, 0.0, 1.0, 1.0]
    assert station.busy_s == 4.0


def test_a_stall_prolongs_what_decodes_and_nothing_that_comes_later(part: Any) -> None:
    simulation = part("simulation")
    clock = simulation.Clock()
    engine, ended = simulation.Engine(clock, 1), []
    for _ in range(2):
        engine.ask(2.0, lambda: ended.append(clock.now))
    clock.after(1.0, lambda: engine.stall(0.5))
    clock.run()
    assert ended == [2.5, 4.5]


def test_a_slower_card_is_asked_less_of(part: Any) -> None:
    costs, capacity = part("costs"), part("capacity")
    fast = capacity.Plan(costs.WORKLOADS["maths"], costs.MODELS["7B"], costs.Assumed())
    slow = replace(fast, assumed=replace(fast.assumed, engine_tokens_s=1000.0, trainer_tokens_s=1000.0))
    assert slow.gpus_at("router", 0.7) > 3 * fast.gpus_at("router", 0.7)
