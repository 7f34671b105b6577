"""A tool's config: wrong values and unknown keys are named."""

from __future__ import annotations

from typing import Any

import pytest

from agentloop.errors import ToolConfigError
from tools.http import Options


def read(config: dict[str, Any]) -> tuple[Any, ...]:
    options = Options("search", config)
    found = (
        options.whole("workers", 120, 1, 1000),
        options.number("rate", 150.0, 0, 1e6),
        options.text("url"),
        options.text("mode", "a", choices=("a", "b")),
        options.flag("scores", True),
        options.texts("headers"),
    )
    options.done(ignored=("enable_global_rate_limit",))
    return found


def test_values_and_defaults() -> None:
    assert read({"type": "native"}) == (120, 150.0, None, "a", True, {})
    assert read({"workers": 3, "rate": 2, "url": "u", "mode": "b", "scores": False, "headers": {"a": "b"}}) == (
        3, 2.0, "u", "b", False, {"a": "b"},
    )  # fmt: skip
    assert read({"workers": None, "enable_global_rate_limit": True})[0] == 120


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"workers": 0}, "config.workers is 0"),
        ({"workers": True}, "config.workers is True"),
        ({"workers": 2.5}, "config.workers is 2.5"),
        ({"rate": 0}, "config.rate is 0"),
        ({"rate": float("nan")}, "config.rate is nan"),
        ({"rate": "150"}, "config.rate is '150'"),
        ({"url": ""}, "config.url is ''"),
        ({"mode": "c"}, "one of: a, b"),
        ({"scores": 1}, "config.scores is 1"),
        ({"headers": {"a": 1}}, "config.headers is not a mapping of texts"),
        ({"workrs": 3}, "did you mean 'workers'"),
    ],
)
def test_a_wrong_value_is_named(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ToolConfigError, match=says):
        read(config)
