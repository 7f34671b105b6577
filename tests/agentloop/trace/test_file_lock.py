"""`locked`: one holder at a time, who is named to those that wait; they wait a bounded time."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from agentloop.trace import file_lock as file_lock_module
from agentloop.trace.file_lock import Held, locked

HOLD = """
import sys, time
from pathlib import Path
from agentloop.trace.file_lock import locked
with locked(Path(sys.argv[1]), 10):
    print("held", flush=True)
    time.sleep(1000)
"""


def test_another_holder_is_named_and_not_waited_for_without_end(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder, holder.stdout:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Held, match=f"process {holder.pid} on ") as caught, locked(path, 0.1):
            pass
        with pytest.raises(Held), locked(path, 1000, beside=caught.value.holder):
            pass
        holder.kill()
    with locked(path, 10), pytest.raises(Held, match=f"process {os.getpid()} on "), locked(path, 0):
        pass


def test_holders_that_change_are_waited_for(tmp_path: Path) -> None:
    path, done = tmp_path / "lock", threading.Event()
    got: list[int] = []

    def take(number: int) -> None:
        for _ in range(20):
            with locked(path, 5):
                got.append(number)
                assert not done.wait(0.005)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == sorted([0, 1, 2] * 20)


@pytest.mark.parametrize("changes", [True, False])
def test_the_wait_begins_anew_with_each_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: bool) -> None:
    seconds, looks, tries = itertools.count(), itertools.count(), itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(seconds), time_ns=time.time_ns, sleep=lambda _: None)
    monkeypatch.setattr(file_lock_module, "time", clock)
    monkeypatch.setattr(file_lock_module, "_taken", lambda _: next(tries) == 10)
    monkeypatch.setattr(file_lock_module, "_read", lambda _: f"holder {next(looks) if changes else 0}")
    if changes:
        with locked(tmp_path / "lock", 5):
            pass
    else:
        with pytest.raises(Held), locked(tmp_path / "lock", 5):
            pass


def test_who_could_not_describe_itself_is_another_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, 1):
        for text in ("", "{", "[]", '{"pid": null}'):
            path.write_text(text)
            with pytest.raises(Held, match="another process"), locked(path, 0):
                pass
