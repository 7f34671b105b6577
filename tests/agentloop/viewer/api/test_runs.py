"""Which runs are found, and under which ids."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path
from urllib.parse import quote

import pytest

from agentloop.viewer.api.run import Run
from agentloop.viewer.api.runs import Runs
from tests.agentloop.viewer.api.conftest import getter


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentloop.viewer.api.runs.SEARCH_EVERY_S", 0.0)


def make(folder: Path, **row: float) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "reward/mean": 0.5} | row) + "\n")
    return folder


def ids(*roots: Path) -> list[str]:
    return sorted(run.id for run in Runs(roots).all())


async def test_a_folder_that_is_empty_or_missing_has_no_runs_until_one_appears(tmp_path: Path) -> None:
    ask = getter(tmp_path / "later", tmp_path)
    assert (await ask("/api/runs")).json() == {"runs": []}
    make(tmp_path / "later" / "one")
    assert [run["id"] for run in (await ask("/api/runs")).json()["runs"]] == ["one"]


def test_a_run_a_folder_and_folders_in_it(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "deep" / "er" / "b")
    make(tmp_path / "deep" / "er" / "too" / "far")
    make(tmp_path / "a" / "checkpoints" / "inner")  # within a run
    make(tmp_path / ".hidden")
    assert ids(tmp_path) == ["a", "deep:er:b"]
    assert ids(tmp_path / "a") == ["a"]
    assert ids(tmp_path / "a", tmp_path) == ["a", "deep:er:b"]


def test_two_runs_of_one_name_keep_their_ids(tmp_path: Path) -> None:
    first, second = make(tmp_path / "x" / "run"), make(tmp_path / "y" / "run")
    runs = Runs([first, second])
    by_path = {run.path: run.id for run in runs.all()}
    assert by_path[first] == "run"
    assert by_path[second].startswith("run~")
    make(tmp_path / "z" / "run")
    assert {run.path: run.id for run in runs.all()} == by_path


def test_links_do_not_lead_out_of_the_roots(tmp_path: Path) -> None:
    secret = make(tmp_path / "secret")
    served = tmp_path / "served"
    make(served / "mine")
    (served / "link").symlink_to(secret)
    (served / "loop").symlink_to(served)
    assert ids(served) == ["mine"]
    (tmp_path / "door").symlink_to(served)
    assert ids(tmp_path / "door") == ["mine"]  # the reader named this link


@pytest.mark.parametrize("name", ["a b", "100%", "x#y?z", "ünï", "x..", "a&b=c", "new\nline", "'\"<b>"])
async def test_names_with_odd_characters(tmp_path: Path, name: str) -> None:
    make(tmp_path / name)
    ask = getter(tmp_path)
    (run,) = (await ask("/api/runs")).json()["runs"]
    answer = await ask(f"/api/runs/{quote(run['id'], safe='')}")
    assert (answer.status_code, answer.json()["name"]) == (200, name)


async def test_a_name_that_is_not_unicode(tmp_path: Path) -> None:
    make(Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xff")))
    ask = getter(tmp_path)
    (run,) = (await ask("/api/runs")).json()["runs"]
    assert run["name"] == "r\ufffd"
    assert (await ask(f"/api/runs/{quote(run['id'], safe='')}")).status_code == 200


async def test_a_run_that_vanishes_is_no_longer_served(tmp_path: Path) -> None:
    folder = make(tmp_path / "one")
    ask = getter(tmp_path)
    assert (await ask("/api/runs/one")).status_code == 200
    (folder / "metrics.jsonl").unlink()
    assert (await ask("/api/runs/one")).status_code == 404


async def test_runs_of_fine_tuning_and_of_evaluation(tmp_path: Path) -> None:
    sft = tmp_path / "sft"
    sft.mkdir()
    (sft / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"torn')
    (tmp_path / "eval" / "config").mkdir(parents=True)
    (tmp_path / "eval" / "config" / "resolved.json").write_text('{"eval": {"only": true}}')
    ask = getter(tmp_path)
    runs = {run["id"]: run for run in (await ask("/api/runs")).json()["runs"]}
    assert {name: run["kind"] for name, run in runs.items()} == {"sft": "sft", "eval": "eval"}
    assert (runs["sft"]["steps"], runs["sft"]["loss_last"], runs["sft"]["has_traces"]) == (2, 1.5, False)
    assert (await ask("/api/runs/sft/metrics", keys="loss")).json()["series"] == {"loss": [2.0, 1.5]}
    assert (await ask("/api/runs/sft/episodes")).json()["total"] == 0
    assert (await ask("/api/runs/sft/failures")).json()["causes"] == []
    assert not (sft / "traces").exists()


def test_a_run_is_live_while_its_lock_is_held(tmp_path: Path) -> None:
    run = Run("one", make(tmp_path / "one"))
    lock = run.path / ".lock"
    lock.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    assert not run.live
    with lock.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run.live
        (run.path / "finished.json").write_text('{"steps": 1}')
        assert not run.live
        (run.path / "finished.json").unlink()
    assert not run.live


def test_a_run_of_another_machine_is_live_while_it_writes(tmp_path: Path) -> None:
    run = Run("one", make(tmp_path / "one"))
    (run.path / ".lock").write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    assert run.live
    os.utime(run.path / "metrics.jsonl", (0, 0))
    assert not run.live


def test_an_index_that_is_being_made_ends_with_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentloop.trace.index import TraceIndex
    from agentloop.trace.index import index as module
    from agentloop.trace.store import TraceFile, TraceStore
    from tests.agentloop.trace.store.support import step_records

    for step in (1, 2, 3):
        TraceStore(tmp_path).write(step, "train", step_records(step))
    index, read, real = TraceIndex(tmp_path), list[int](), module.read_rows

    def closing(store: TraceStore, file: TraceFile) -> object:
        read.append(file.step)
        index.close()
        return real(store, file)

    monkeypatch.setattr(module, "read_rows", closing)
    index.refresh()
    assert read == [1]
    assert TraceIndex(tmp_path).query().total == 8
