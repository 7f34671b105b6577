"""The record of what was sent: damage is moved aside wherever it is found, and what stops it is named."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from agentloop.trace import exports as exports_module
from agentloop.trace.exports import DAMAGED_FILE, FILE, ExportLog, RecordUnavailable

PAGE = 4096
ENTRIES = [(f"{number:032x}", 1, f"{number + 10**6:032x}") for number in range(3000)]


def damaged(folder: Path) -> bytes:
    """Damage a record beyond its first page, which holds its tables' names; return its content."""
    log = ExportLog(folder)
    log.mark("here", ENTRIES)
    log.close()
    path = folder / FILE
    content = path.read_bytes()[:PAGE] + b"\x77" * (path.stat().st_size - PAGE)
    path.write_bytes(content)
    return content


@pytest.mark.parametrize("work", ["sent", "contents", "mark", "check_writable", "counts"])
def test_damage_beyond_the_first_page_is_moved_aside_wherever_it_is_found(tmp_path: Path, work: str) -> None:
    content = damaged(tmp_path)
    said: list[str] = []
    log = ExportLog(tmp_path, warn=said.append)
    if work in ("sent", "contents"):
        assert getattr(log, work)("here", [ENTRIES[1500][0], ENTRIES[1500][2]]) == set()
    elif work == "mark":
        log.mark("here", ENTRIES[:2])
    else:
        getattr(log, work)()
    assert (tmp_path / DAMAGED_FILE).read_bytes() == content
    assert len(said) == 1 and DAMAGED_FILE in said[0] and "sent again" in said[0]
    assert log.counts() == ({"here": 2} if work == "mark" else {})
    log.mark("here", ENTRIES[:3])
    assert ExportLog(tmp_path).counts() == {"here": 3} and len(said) == 1


def test_a_second_process_that_found_the_damage_keeps_the_new_file(tmp_path: Path) -> None:
    content = damaged(tmp_path)
    said: list[str] = []
    first, second = ExportLog(tmp_path, warn=said.append), ExportLog(tmp_path, warn=said.append)

    def meanwhile(db: sqlite3.Connection) -> None:
        if not first.sent("here", [ENTRIES[0][0]]):
            first.mark("here", ENTRIES[:2])
        db.execute("SELECT count(*), max(content) FROM sent").fetchall()

    second._with_database(meanwhile)
    assert second.sent("here", [ENTRIES[0][0]]) == {ENTRIES[0][0]}
    assert (tmp_path / DAMAGED_FILE).read_bytes() == content and len(said) == 1


def test_a_file_that_another_process_moved_or_deleted_is_opened_anew(tmp_path: Path) -> None:
    log, other = ExportLog(tmp_path), ExportLog(tmp_path)
    log.mark("here", ENTRIES[:1])
    (tmp_path / FILE).unlink()
    assert log.counts() == {}
    other.mark("here", ENTRIES[:2])
    assert log.counts() == {"here": 2}
    log.mark("here", ENTRIES[:3])
    assert other.counts() == {"here": 3}


def test_a_disk_that_damages_what_is_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = ExportLog(tmp_path)
    log.mark("here", ENTRIES[:1])

    def broken(*_: object) -> None:
        exc = sqlite3.DatabaseError("database disk image is malformed")
        exc.sqlite_errorcode = sqlite3.SQLITE_CORRUPT | 1 << 8
        raise exc

    monkeypatch.setattr(exports_module, "_write", broken)
    with pytest.raises(RecordUnavailable, match="malformed"):
        log.mark("here", ENTRIES)
    assert (tmp_path / DAMAGED_FILE).exists()


def test_a_lock_is_named_and_waited_for_only_so_long(tmp_path: Path) -> None:
    log = ExportLog(tmp_path, busy_timeout_s=0.05)
    log.mark("here", ENTRIES[:1])
    other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    for work in (log.counts, log.check_writable, ExportLog(tmp_path, busy_timeout_s=0.05).counts):
        with pytest.raises(RecordUnavailable, match=r"exports\.sqlite: database is locked"):
            work()
    other.execute("COMMIT")
    other.close()
    log.check_writable()
    assert log.counts() == {"here": 1} and not (tmp_path / DAMAGED_FILE).exists()


def test_reading_makes_no_file_and_what_cannot_be_made_is_named(tmp_path: Path) -> None:
    log = ExportLog(tmp_path / "traces")
    assert log.counts() == {} and log.sent("here", [ENTRIES[0][0]]) == set()
    assert not (tmp_path / "traces").exists()
    (tmp_path / "traces").touch()
    with pytest.raises(RecordUnavailable, match="traces"):
        log.check_writable()
