"""Damage to a run directory: `--resume` goes on from an intact checkpoint, or names the way."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from agentloop.errors import RunDirError
from agentloop.trace.store import TraceStore
from trainer.checkpoint_files import BrokenCheckpoint, read_state, seal, verify
from trainer.run.rundir import RunDir

CONFIG = {"seed": 0, "model": {"path": "m"}}


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """A run of six steps with checkpoints of steps 4 and 6."""
    run_dir = RunDir(tmp_path / "run")
    run_dir.open(CONFIG, {}, resume=False)
    for step in range(7):
        run_dir.append_metrics({"step": step, "reward/mean": step / 10})
        TraceStore(run_dir.root).write(step, "train", [])
    for step in (4, 6):
        folder = run_dir.checkpoint_of(step)
        (folder / "trainer").mkdir(parents=True)
        for name in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
            (folder / "trainer" / name).write_bytes(f"{name} of step {step} ".encode() * 100)
        (folder / "groups.parquet").write_text("{}\n")
        seal(folder, {"step": step, "version": step, "kl_coef": 0.5})
    return run_dir


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(b"\x00\xff" * 100)


def without_key(key: str) -> Callable[[Path], None]:
    def remove(path: Path) -> None:
        state = json.loads(path.read_text())
        del state[key]
        path.write_text(json.dumps(state))

    return remove


def replaced(old: str, new: str) -> Callable[[Path], None]:
    return lambda path: (path.write_text(path.read_text().replace(old, new)), None)[1]


TENSORS, META, STATE = "trainer/__0_0.distcp", "trainer/.metadata", "state.json"
DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    (TENSORS, flip, "__0_0.distcp was altered"),
    (TENSORS, cut, "__0_0.distcp has"),
    (TENSORS, empty, "__0_0.distcp has 0 bytes"),
    (TENSORS, Path.unlink, "__0_0.distcp is missing"),
    ("trainer/__1_0.distcp", Path.unlink, "__1_0.distcp is missing"),
    (META, flip, ".metadata was altered"),
    (META, cut, ".metadata has"),
    (META, Path.unlink, ".metadata is missing"),
    ("trainer", shutil.rmtree, "is missing"),
    (STATE, cut, "state.json is not JSON"),
    (STATE, empty, "state.json is not JSON"),
    (STATE, garbage, "state.json is not JSON"),
    (STATE, Path.unlink, "has no state.json"),
    (STATE, replaced('"version": 6', '"version": 5'), "state.json was altered"),
    (STATE, without_key("step"), "has no step and version"),
    (STATE, without_key("files"), "state.json was altered"),
    (STATE, without_key("checksum"), "state.json was altered"),
    (STATE, lambda path: (path.write_text("[]"), None)[1], "has no step and version"),
]


@pytest.mark.parametrize(("name", "damage", "fault"), DAMAGE, ids=lambda value: getattr(value, "__name__", None))
def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_used(
    run_dir: RunDir, name: str, damage: Callable[[Path], None], fault: str
) -> None:
    damage(run_dir.checkpoint_of(6) / name)
    told: list[str] = []
    assert run_dir.open(CONFIG, {}, resume=True, warn=told.append) == []
    assert run_dir.resume_point is not None
    assert (run_dir.resume_point.step, run_dir.resume_point.kl_coef) == (4, 0.5)
    assert len(told) == 1 and fault in told[0] and "step_6" in told[0] and "goes on from step 4" in told[0]
    # It is kept, but it is never pruned for, chosen or told again.
    assert sorted(path.name for path in run_dir.checkpoints.iterdir()) == ["step_4", "step_6.damaged"]
    run_dir.rewind(4)
    assert [row["step"] for row in run_dir.read_metrics()] == [0, 1, 2, 3, 4]
    run_dir.open(CONFIG, {}, resume=True, warn=pytest.fail)


@pytest.mark.parametrize(("name", "damage", "fault"), DAMAGE, ids=lambda value: getattr(value, "__name__", None))
def test_without_an_intact_one_the_folder_to_move_is_named(
    run_dir: RunDir, name: str, damage: Callable[[Path], None], fault: str
) -> None:
    shutil.rmtree(run_dir.checkpoint_of(4))
    damage(run_dir.checkpoint_of(6) / name)
    with pytest.raises(RunDirError) as caught:
        run_dir.open(CONFIG, {}, resume=True, warn=pytest.fail)
    assert fault in str(caught.value) and f"move {run_dir.checkpoints} away" in str(caught.value)
    assert run_dir.checkpoint_of(6).is_dir()
    shutil.move(run_dir.checkpoints, run_dir.root / "away")  # as it says
    run_dir.open(CONFIG, {}, resume=True, warn=pytest.fail)
    assert run_dir.resume_point is None


def test_an_old_checkpoint_that_is_damaged_does_not_matter(run_dir: RunDir) -> None:
    empty(run_dir.checkpoint_of(4) / STATE)
    run_dir.open(CONFIG, {}, resume=True, warn=pytest.fail)
    assert run_dir.resume_point is not None and run_dir.resume_point.step == 6


@pytest.mark.parametrize("damage", [cut, empty, garbage, Path.unlink])
def test_a_damaged_configuration_is_told_and_replaced(run_dir: RunDir, damage: Callable[[Path], None]) -> None:
    damage(run_dir.config_file)
    told: list[str] = []
    run_dir.open(CONFIG, {}, resume=True, warn=told.append)
    assert run_dir.resume_point is not None and run_dir.resume_point.step == 6
    assert len(told) == 1 and "resolved.json is missing or damaged" in told[0]
    assert run_dir.read_config() == CONFIG


@pytest.mark.parametrize("damage", [cut, flip, empty])
def test_damaged_groups_are_sampled_again(run_dir: RunDir, damage: Callable[[Path], None]) -> None:
    groups = run_dir.checkpoint_of(6) / "groups.parquet"
    damage(groups)
    told: list[str] = []
    run_dir.open(CONFIG, {}, resume=True, warn=told.append)
    assert run_dir.resume_point is not None and run_dir.resume_point.step == 6
    assert len(told) == 1 and "sampled again" in told[0] and not groups.exists()


def test_deleted_groups_are_sampled_again_without_a_word(run_dir: RunDir) -> None:
    (run_dir.checkpoint_of(6) / "groups.parquet").unlink()
    run_dir.open(CONFIG, {}, resume=True, warn=pytest.fail)
    assert run_dir.resume_point is not None and run_dir.resume_point.step == 6


def test_a_checkpoint_of_an_earlier_version_is_used_and_told(run_dir: RunDir) -> None:
    (run_dir.checkpoint_of(6) / STATE).write_text('{"step": 6, "version": 6}')
    told: list[str] = []
    run_dir.open(CONFIG, {}, resume=True, warn=told.append)
    assert run_dir.resume_point is not None and run_dir.resume_point.step == 6
    assert len(told) == 1 and "has no checksums" in told[0]


def test_the_seal_is_of_every_file(run_dir: RunDir) -> None:
    folder = run_dir.checkpoint_of(6)
    assert verify(folder) == []
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(read_state(folder)["files"]) == names - {STATE}
    with pytest.raises(BrokenCheckpoint, match=re.escape("state.json")):
        read_state(folder / "trainer")


def test_what_is_no_checkpoint_of_the_run_does_not_stop_a_resume(run_dir: RunDir) -> None:
    """A copy with another spelling of its number, a copy under another number, a link at the place of a damaged one."""
    shutil.copytree(run_dir.checkpoint_of(4), run_dir.checkpoints / "step_05")
    shutil.copytree(run_dir.checkpoint_of(4), run_dir.checkpoint_of(7))
    empty(run_dir.checkpoint_of(6) / "trainer" / "__0_0.distcp")
    (run_dir.checkpoints / "step_6.damaged").symlink_to(run_dir.checkpoint_of(4))

    told: list[str] = []
    run_dir.open(CONFIG, {}, resume=True, warn=told.append)

    assert run_dir.resume_point is not None and run_dir.resume_point.step == 4
    assert any("step_7 is damaged: it holds step 4" in text for text in told), told
    assert (run_dir.checkpoints / "step_05").is_dir()
    assert not (run_dir.checkpoints / "step_6.damaged").is_symlink()
