"""Where published weights lie, and that nothing of them stays."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from agentloop.errors import ConfigError, DiskError
from trainer.publishing.weights_folder import SHARED_MEMORY, WeightsFolder, choose_path, prune_versions


def killed(folder: WeightsFolder) -> None:
    """Free the lock of a run, as its end does, and clean up nothing."""
    assert folder._lock is not None
    folder._lock.release()


def test_it_is_in_memory_on_one_machine_and_in_the_run_else(tmp_path: Path) -> None:
    assert choose_path(tmp_path, None, local=True).parent == SHARED_MEMORY
    assert choose_path(tmp_path, None, local=False) == tmp_path
    assert choose_path(tmp_path, tmp_path / "elsewhere", local=False).parent == tmp_path / "elsewhere"


def test_each_run_has_its_own_and_finds_what_a_killed_one_left(tmp_path: Path) -> None:
    named = tmp_path / "memory"
    first = WeightsFolder.create(tmp_path / "a", named, local=True)
    (first.path / "v_7").mkdir()
    other = WeightsFolder.create(tmp_path / "b", named, local=True)
    assert other.path != first.path and (first.path / "v_7").exists()
    killed(first)
    again = WeightsFolder.create(tmp_path / "a", named, local=True)
    assert again.path == first.path and not (again.path / "v_7").exists()
    assert again.path.stat().st_mode & 0o777 == 0o700


def test_what_another_killed_run_left_is_removed_too(tmp_path: Path) -> None:
    left, lives = (WeightsFolder.create(tmp_path / name, tmp_path / "memory", local=True) for name in ("left", "lives"))
    killed(left)
    WeightsFolder.create(tmp_path / "new", tmp_path / "memory", local=True)
    assert lives.path.exists() and not left.path.exists()


def test_what_a_run_of_an_earlier_version_publishes_stays_while_it_lives(tmp_path: Path) -> None:
    lives, left = (choose_path(tmp_path / name, tmp_path / "memory", local=True) for name in ("lives", "left"))
    ended = subprocess.Popen(["true"])
    ended.wait()
    for path, pid in ((lives, os.getpid()), (left, ended.pid)):
        path.mkdir(parents=True)
        (path / "owner.pid").write_text(str(pid))
    WeightsFolder.create(tmp_path / "new", tmp_path / "memory", local=True)
    assert lives.exists() and not left.exists()


def test_the_folder_of_a_live_run_is_not_taken(tmp_path: Path) -> None:
    """Two containers may share the memory and name their run directories alike."""
    lives = WeightsFolder.create(tmp_path / "run", tmp_path / "memory", local=True)
    (lives.path / "v_7").mkdir()
    with pytest.raises(ConfigError, match=r"of a run that is alive(?s:.*)rollout\.publish\.folder"):
        WeightsFolder.create(tmp_path / "run", tmp_path / "memory", local=True)
    assert [path.name for path in lives.path.parent.iterdir()] == [lives.path.name]
    assert (lives.path / "v_7").exists()


def test_a_full_disk_at_the_end_leaves_nothing_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = WeightsFolder.create(tmp_path / "weights", tmp_path / "memory", local=True)
    (folder.path / "even").mkdir()
    (folder.path / "even" / "model.safetensors").write_text("w")
    monkeypatch.setattr("shutil.copy2", full)
    with pytest.raises(DiskError, match=r"v_2 could not be written: No space left on device \(.* MB free"):
        folder.close(folder.path / "even", "v_2")
    assert list((tmp_path / "memory").iterdir()) == [] and list((tmp_path / "weights").iterdir()) == []


def test_the_last_version_is_kept_in_the_run_when_it_ends(tmp_path: Path) -> None:
    run = tmp_path / "run" / "weights"
    run.mkdir(parents=True)
    folder = WeightsFolder.create(run, tmp_path / "memory", local=True)
    slot = folder.path / "odd"
    slot.mkdir()
    for name in ("model.safetensors", "config.json", "progress"):
        (slot / name).write_text(name)
    folder.close(slot, "v_3")
    assert sorted(path.name for path in (run / "v_3").iterdir()) == ["config.json", "model.safetensors"]
    assert not folder.path.exists() and [path.name for path in run.iterdir()] == ["v_3"]


def test_without_room_the_runs_own_folder_is_used(tmp_path: Path) -> None:
    run = tmp_path / "weights"
    run.mkdir()
    folder = WeightsFolder.create(run, tmp_path / "memory", local=True)
    assert folder.fits(1000) and not folder.fits(2**60)
    before = folder.path
    folder.fall_back()
    assert folder.path == run and not before.exists() and not folder.passes
    folder.close(run / "v_1", "v_1")  # it is where it stays
    assert run.exists()


def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    path = choose_path(tmp_path / "run", tmp_path / "memory", local=True)
    path.parent.mkdir()
    path.symlink_to(tmp_path / "theirs")
    with pytest.raises(ConfigError, match=r"rollout\.publish\.folder"):
        WeightsFolder.create(tmp_path / "run", tmp_path / "memory", local=True)


def test_old_versions_are_deleted_but_for_two(tmp_path: Path) -> None:
    for name in ("v_1", "v_2", "v_3", "v_4", "v_x", "even"):
        (tmp_path / name).mkdir()
    prune_versions(tmp_path, current=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["even", "v_2", "v_3", "v_4", "v_x"]
