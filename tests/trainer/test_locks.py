"""A lock has one holder, and a holder that was killed is none."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.locks import FileLock, Locked, is_locked

HOLD = """
import sys, time
from pathlib import Path
from trainer.locks import FileLock
lock = FileLock.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_one_process_holds_a_lock_until_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, env=environment) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        assert is_locked(path)
        with pytest.raises(Locked) as caught:
            FileLock.take(path)
        assert (caught.value.holder.pid, caught.value.holder.host) == (holder.pid, socket.gethostname())
        holder.send_signal(signal.SIGKILL)
    assert not is_locked(path)
    with FileLock.take(path):
        assert is_locked(path)
    assert not is_locked(path)


def test_a_lock_is_found_by_any_path_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    with FileLock.take(tmp_path / "run" / "lock"), pytest.raises(Locked):
        FileLock.take(tmp_path / "link" / "lock")


def test_a_removed_lock_can_be_taken_again(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = FileLock.take(path)
    first.release(remove=True)
    assert not path.exists() and not is_locked(path)
    with FileLock.take(path):
        first.release(remove=True)  # a second release does nothing
        assert path.exists()


@pytest.mark.parametrize("text", [b"", b"12", b"[]", b"{", b'{"pid": "x"}', b"\xff"])
def test_a_holder_that_is_not_described_is_another_process(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "lock"
    with FileLock.take(path):
        path.write_bytes(text)
        with pytest.raises(Locked, match="another process"):
            FileLock.take(path)


def test_without_locks_the_process_that_a_file_names_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    path = tmp_path / "lock"
    monkeypatch.setattr("fcntl.flock", unsupported)
    with FileLock.take(path) as lock:
        assert not lock.supported and is_locked(path)
    ended = subprocess.Popen(["true"])
    ended.wait()
    path.write_text(json.dumps({"pid": ended.pid, "host": socket.gethostname()}))
    assert not is_locked(path)
    path.write_text(json.dumps({"pid": ended.pid, "host": "another"}))
    assert is_locked(path)


def test_a_link_in_place_of_a_lock_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("kept")
    (tmp_path / "lock").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        FileLock.take(tmp_path / "lock")
    assert victim.read_text() == "kept"
