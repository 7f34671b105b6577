"""Servers that the tests of the sandbox share."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.tools.sandbox.support import Sandbox, Serving, descendants, programs


@pytest.fixture(scope="session", autouse=True)
def needed(bubblewrap: None) -> None:
    """All tests of this folder need it."""


@pytest.fixture(scope="package")
def sandbox() -> Iterator[Sandbox]:
    """A server with small limits that the tests share."""
    serving = Serving()
    yield serving.start()
    serving.end()


@pytest.fixture
def serving() -> Iterator[Serving]:
    found = Serving()
    yield found
    found.end()


@pytest.fixture
def well_after(sandbox: Sandbox) -> Iterator[None]:
    """After each case: the server answers, and nothing of the case is left."""
    yield
    assert sandbox.printed("print(6 * 7)") == "42\n"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        health = sandbox.health()
        pool = sandbox.app.state.runner.pool
        if health["running"] == 0 and pool.live == health["idle"] == 2 and len(programs()) == pool.live:
            return
        time.sleep(0.05)
    left = f"running {health['running']}, idle {health['idle']}, {pool.live} sandboxes"
    raise AssertionError(f"something is left: {left}: {descendants()}")
