"""A receiver of OpenTelemetry spans for the tests of what is sent to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.agentloop.trace.otlp_receiver import Receiver


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    from tests.agentloop.trace.otlp_receiver import Receiver  # needs the extra `otlp`

    made = Receiver()
    yield made
    made.close()
