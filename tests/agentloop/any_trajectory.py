"""Strategies of hypothesis for trajectories, and a form in which they are compared to the bit."""

from __future__ import annotations

import math
import struct
from dataclasses import fields
from typing import Any

import numpy as np
from hypothesis import strategies as st

from agentloop.columns import Logprobs, LossMask, TokenIds, Versions
from agentloop.faults import Fault
from agentloop.types import EpisodeStatus, MalformedCall, Span, StepReward, StopReason, ToolCall, Trajectory, Turn

# Lone surrogates, control characters and markup included.
TEXT = st.text(st.characters(), max_size=12) | st.sampled_from(["\ud800", "a\x00b", "\x1b[31m", "\u202e", "</script>"])
FLOAT = st.floats()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(-(2**90), 2**90) | FLOAT | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(TEXT, JSON, max_size=3)
TURN = st.builds(
    Turn,
    start=st.integers(0, 9),
    end=st.integers(0, 9),
    text=TEXT,
    stop_reason=st.sampled_from(StopReason),
    tool_calls=st.lists(st.builds(ToolCall, TEXT, ARGUMENTS, TEXT), max_size=2),
    malformed_calls=st.lists(st.builds(MalformedCall, TEXT, TEXT), max_size=1),
    reasoning=st.none() | TEXT,
    latency_s=FLOAT,
    prompt_digest=st.none() | st.integers(0, 2**64),
)
MESSAGE = st.fixed_dictionaries({"role": TEXT, "content": TEXT}, optional={"tool_call_id": TEXT, "name": TEXT})
NUMBERS = st.dictionaries(TEXT, FLOAT, max_size=3)
SPAN = st.builds(
    Span, TEXT, TEXT, st.none() | TEXT, st.integers(), st.integers(), st.just("error"), st.none() | TEXT,
    st.dictionaries(TEXT, TEXT | st.booleans() | st.integers() | FLOAT, max_size=3),
)  # fmt: skip


@st.composite
def columns(draw: Any) -> dict[str, Any]:
    """Token columns: lawful, or of any other shape."""
    n = draw(st.integers(0, 12))
    ids = draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=n, max_size=n))
    mask = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n))
    single = st.floats(width=32) | st.just(float("nan"))
    number = draw(st.sampled_from([single, FLOAT, st.none() | FLOAT]))
    logprobs = [draw(number) if m else None for m in mask]
    versions = [draw(st.integers(0, 3)) if m else None for m in mask]
    kind = draw(st.sampled_from(["lawful", "lawful", "lists", "long mask", "odd mask", "unsampled", "no version"]))
    if kind == "lists":
        return {"token_ids": ids, "loss_mask": mask, "logprobs": logprobs, "versions": versions}
    mask += [1] * (kind == "long mask")
    if n and kind == "odd mask":
        mask[0] = 7
    if n and kind == "unsampled":
        logprobs[0], versions[0], mask[0] = -1.5, 4, 0
    if n and kind == "no version":
        versions[-1] = None
    return {
        "token_ids": TokenIds(ids),
        "loss_mask": LossMask(mask),
        "logprobs": Logprobs(logprobs),
        "versions": Versions(versions),
    }


@st.composite
def trajectories(draw: Any) -> Trajectory:
    return Trajectory(
        **draw(columns()),
        prompt_length=draw(st.integers(0, 12)),
        turns=draw(st.lists(TURN, max_size=2)),
        reward=draw(st.none() | FLOAT),
        reward_parts=draw(NUMBERS),
        outcome=draw(st.none() | FLOAT),
        answer=draw(st.none() | TEXT),
        step_rewards=draw(st.lists(st.builds(StepReward, TEXT, FLOAT, st.integers(), st.integers()), max_size=2)),
        stop_reason=draw(st.sampled_from(StopReason)),
        status=draw(st.sampled_from(EpisodeStatus)),
        error=draw(st.none() | TEXT),
        broken_rule=draw(st.none() | TEXT),
        agent_name=draw(TEXT),
        task_id=draw(TEXT),
        group_id=draw(TEXT),
        sample_index=draw(st.integers(0, 2**70)),
        data_source=draw(TEXT),
        messages=draw(st.lists(MESSAGE, max_size=2)),
        metrics=draw(NUMBERS | st.just({"tools": 3, "big": 2**70})),
        trace_id=draw(TEXT),
        spans=draw(st.lists(SPAN, max_size=2)),
        faults=draw(st.lists(st.builds(Fault, TEXT, TEXT, TEXT, TEXT), max_size=1)),
    )


def exact(value: Any) -> Any:
    """A form in which values are equal exactly if they are the same to the bit."""
    if isinstance(value, float):
        return "nan" if math.isnan(value) else struct.pack("<d", value)
    if isinstance(value, Logprobs):  # one NaN is as good as another; None is not one of them
        return [exact(item) for item in value]
    if isinstance(value, TokenIds | LossMask | Versions):
        return list(value)
    if isinstance(value, np.ndarray):
        return value.dtype, value.tobytes()
    if isinstance(value, dict):
        return [(key, exact(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [exact(item) for item in value]
    if hasattr(type(value), "__dataclass_fields__"):
        return [(f.name, exact(getattr(value, f.name))) for f in fields(value)]
    return value
