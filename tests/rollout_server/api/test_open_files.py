"""How many connections the limit of open files leaves."""

from __future__ import annotations

import pytest

from rollout_server.api import connection


@pytest.mark.parametrize(("files", "most"), [(10_064, 10_000), (1024, 960), (128, 64), (64, 32), (1, 1)])
def test_connections_leave_files_for_everything_else(files: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "allow_open_files", lambda wanted: min(wanted, files))
    assert connection.most_connections(10_000) == most
