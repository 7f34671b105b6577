"""Whatever numbers and texts a run wrote, the rules judge it without an error."""

from __future__ import annotations

import json
import math
import random
import warnings
from typing import Any

import numpy as np
import pytest

from agentloop.trace.signals import judge
from agentloop.trace.signals.evidence import Evidence
from agentloop.trace.signals.facts import Drift, EpisodeFacts, StepFacts, Sums
from tests.agentloop.trace.signals.support import row

ODD: list[Any] = [None, math.nan, math.inf, -math.inf, 0, -1, 1, 10**400, 1e308, -1e308, 5e-324, "x", "", True, []]
NUMBERS = [0.0, 1.0, -1.0, 0.5, 1e308, -1e308, 5e-324, 1e-9, 12345.678]
TEXTS = ["", "a", "b", "{brace} %s", "c({})", 'c({"x": 1})']


def episode(rng: random.Random, step: int, number: int) -> EpisodeFacts:
    return EpisodeFacts(
        key=f"train/{step}/g{number // 4}/{number % 4}/0",
        group=f"g{number // 4}",
        task=rng.choice(["t", f"t{number}"]),
        ok=rng.random() < 0.9,
        reward=rng.choice([None, *NUMBERS]),
        parts={name: rng.choice(NUMBERS) for name in rng.sample(["format", "correct", ""], rng.randrange(3))},
        answer=rng.choice(TEXTS),
        answered=rng.random() < 0.5,
        calls=tuple(rng.choices(TEXTS, k=rng.randrange(6))),
        turn_stops=tuple(rng.choices(["stop", "length", "odd"], k=rng.randrange(4))),
        tokens=rng.randrange(10**6),
        tools={rng.choice(TEXTS): (rng.randrange(40), rng.randrange(40))},
        staleness=rng.choice([None, -3, 0, 9]),
        mismatch=rng.choice([None, *NUMBERS]),
    )


def sums(rng: random.Random) -> Sums:
    size = rng.randrange(6)
    totals = [abs(rng.choice(NUMBERS)) for _ in range(size)]
    return Sums(np.array(totals), np.array([rng.choice([0, 30, 1000]) for _ in range(size)], float))


@pytest.mark.parametrize("seed", range(40))
def test_the_rules_judge_anything(seed: int) -> None:
    rng = random.Random(seed)
    keys = [*row(1), "eval/reward_mean", "stop/length"]
    lines = [
        row(step) | {rng.choice(keys): rng.choice(ODD) for _ in range(rng.randrange(6))}
        for step in range(rng.randrange(20))
    ]
    steps = [
        StepFacts(
            step,
            [episode(rng, step, number) for number in range(rng.randrange(48))],
            Drift(sums(rng), sums(rng), sums(rng)),
        )
        for step in range(rng.randrange(12))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = judge(Evidence(lines, steps))
    for signal in found:
        assert math.isfinite(signal.value) and signal.sentence
        json.dumps(signal.to_json(), allow_nan=False)
