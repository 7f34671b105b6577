"""Servers that the tests of the sandbox share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.tools.sandbox.support import Sandbox, Serving


@pytest.fixture(scope="session", autouse=True)
def bubblewrap() -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed: apt-get install bubblewrap")


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
