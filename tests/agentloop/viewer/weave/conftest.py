"""A real trace server, and programs that use a real, unmodified weave client against it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.agentloop.viewer.trace_server import TraceServer
from tests.forked_programs import ForkedPrograms

CLIENTS = Path(__file__).parent / "clients"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TraceServer]:
    started = TraceServer(tmp_path_factory.mktemp("runs"))
    yield started
    started.stop()


@pytest.fixture
def client(server: TraceServer, weave_programs: ForkedPrograms, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a program of `clients/`, perhaps without some variables; return the JSON of its last line, and all
    it printed."""

    def run(name: str, *arguments: str, without: Sequence[str] = ()) -> dict[str, Any]:
        variables = {key: value for key, value in server.variables().items() if key not in without}
        done = weave_programs.run(CLIENTS / name, *arguments, environment=variables, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return {**json.loads(done.stdout.splitlines()[-1]), "printed": done.stdout + done.stderr}

    return run
