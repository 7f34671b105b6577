"""The database of what was received, while it is being made."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from agentloop.viewer.received import DATABASE, Received


def test_a_database_without_its_tables_yet_reads_as_empty(tmp_path: Path) -> None:
    """A page may ask between the moment when the file appears and the end of the first write."""
    with sqlite3.connect(tmp_path / DATABASE) as made:
        made.execute("PRAGMA journal_mode = WAL")
    received = Received(tmp_path)
    with received.reading() as connection:
        assert connection.execute("SELECT COUNT(*) FROM calls").fetchone()[0] == 0
    with received.writing() as connection:
        connection.execute("INSERT INTO calls (project, id) VALUES ('lab/runs', '1')")
    with received.reading() as connection:
        assert connection.execute("SELECT COUNT(*) FROM calls").fetchone()[0] == 1
    received.close()
