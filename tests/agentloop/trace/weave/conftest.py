"""A server that answers weave's client."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.agentloop.trace.weave.fake_server import Server
from tests.forked_programs import ForkedPrograms


@pytest.fixture
def fake_server(weave_programs: ForkedPrograms) -> Iterator[Server]:
    started = Server(weave_programs)
    yield started
    started.server.shutdown()
    started.server.server_close()
