"""A machine without cgroups: the server says it once, in words."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from tools.sandbox.isolation import cgroup
from tools.sandbox.isolation.cgroup import find_cgroups
from tools.sandbox.settings import SandboxSettings


def test_missing_cgroups_are_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def none(*_: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory", str(Path("memory.max")))

    monkeypatch.setattr(cgroup, "Cgroups", none)
    cgroup._say_unavailable.cache_clear()
    with caplog.at_level(logging.INFO):
        assert find_cgroups(SandboxSettings(cgroup="auto")) is None
        assert find_cgroups(SandboxSettings(cgroup="auto")) is None
    assert caplog.messages == ["cgroups are not available: limits are enforced by polling"]
