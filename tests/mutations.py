"""Mutations of rows for fuzzing: one place of a valid row gets a value that some data set holds there."""

from __future__ import annotations

import copy
import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("AGENTLOOP_FUZZ_EXAMPLES", 0))

fuzzed = settings(
    max_examples=EXAMPLES or 250,
    deadline=None,
    derandomize=not EXAMPLES,  # the same examples in every run of the suite
    suppress_health_check=list(HealthCheck),
    database=None,
)
"""Settings of the fuzz tests: a few hundred examples, or AGENTLOOP_FUZZ_EXAMPLES of them at random."""

ODD: list[Any] = [
    *(None, True, False, 0, -1, 7, 10**30, -(2**63), 0.5, 72.0, 1e308, float("inf"), float("nan")),
    *("", " ", "x", "null", "{", "[1]", '{"a": null}', "[", "\x00", "\ufeff", "<image>", "<|im_end|>", "{{ x }}"),
    *("ü" * 40, "a" * 3000, "user", "tool", "assistant", "system", "calculator", "single_turn_agent", "../x.png"),
    *([], {}, [[]], [{}], [None], {"": None}, {"a": {"b": [1, None]}}, ["x"], [1, 2], {"type": "image"}),
    *([{"type": "text", "text": "hi"}], [{"type": "text"}], [{"type": "image"}], [{"image_url": {"url": "x"}}]),
    *({"role": "user", "content": "again"}, {"function": {"name": "f", "arguments": "{"}}, {"name": "gsm8k"}),
    *({"calculator": {"create_kwargs": {"x": 1}}}, {"calculator": {"execute_kwargs": None}}, b"bytes"),
]

Path = tuple[str | int, ...]


def paths(value: Any, at: Path = ()) -> list[Path]:
    """Return the place of every part of a value, itself excluded."""
    found: list[Path] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += [(*at, key), *paths(item, (*at, key))]
    return found


def _changed(row: Any, path: Path, value: Any, how: str) -> Any:
    row = copy.deepcopy(row)
    parent = row
    for key in path[:-1]:
        parent = parent[key]
    if how == "delete":
        del parent[path[-1]]
    elif how == "add" and isinstance(parent, dict):
        parent["extra" if not isinstance(value, str) else value] = value
    elif how == "twice" and isinstance(parent, list):
        parent.insert(int(path[-1]), copy.deepcopy(parent[path[-1]]))
    else:
        parent[path[-1]] = value
    return row


@st.composite
def mutated(draw: st.DrawFn, rows: list[dict[str, Any]]) -> tuple[dict[str, Any], set[str]]:
    """Draw a row with one to three changes, and the columns that were changed."""
    row = copy.deepcopy(draw(st.sampled_from(rows)))
    columns: set[str] = set()
    for _ in range(draw(st.integers(1, 3))):
        places = paths(row)
        if not places:
            break
        path = draw(st.sampled_from(places))
        how = draw(st.sampled_from(["replace", "replace", "replace", "delete", "add", "twice"]))
        row = _changed(row, path, draw(st.sampled_from(ODD)), how)
        columns.add(str(path[0]))
    return row, columns
