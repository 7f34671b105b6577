"""A run on a Ray of two nodes: equal to a local one to the bit, also when its processes are killed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.ray_cluster import NODES, cluster, variables

from .conftest import Background, Run, train_quickstart
from .test_resume import without_times

pytestmark = pytest.mark.ray

STEPS = 4
OPTIONS = (
    f"run.steps={STEPS}", "checkpoint.every=1", "eval.every=2", "trainer.ranks=2", "cluster.agents.workers=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a cluster of two nodes."""
    with pytest.MonkeyPatch.context() as patch:
        environment = variables()
        for name, value in environment.items():  # for the runs that join it
            patch.setenv(name, value)
        with cluster(environment) as found:
            yield found


def processes_of_runs() -> dict[str, psutil.Process]:
    """The processes of runs on the cluster's nodes, by name."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            words = process.cmdline()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        if "-P" not in words:  # the wrapper that becomes the process
            continue
        if "--name" in words:
            found[words[words.index("--name") + 1]] = process
        elif "rollout_server" in words and "--parent-pid" not in words:
            found["rollout_server"] = process
    return found


ALL = {"trainer_rank0", "trainer_rank1", "agent_worker0", "agent_worker1", "rollout_server"}


def nothing_is_left() -> bool:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not processes_of_runs():
            return True
        time.sleep(0.1)
    return False


@pytest.fixture(scope="module")
def local(repo: Path, tmp_path_factory: pytest.TempPathFactory, run_forked: Callable[..., Run]) -> Run:
    """The same run on this machine."""
    run = run_forked(tmp_path_factory.mktemp("local"), *train_quickstart(repo, "run", OPTIONS))
    assert run.code == 0, run.err
    return run


@pytest.fixture
def on_ray(background: Callable[..., Background], address: str) -> Callable[..., Background]:
    def start(*overrides: str) -> Background:
        return background(*OPTIONS, "cluster.kind=ray", f"cluster.address={address}", *overrides)

    return start


def assert_equal(run: Run, local: Run) -> None:
    """Metrics but times, and every sampled token, are the same to the bit."""
    kept = [{k: v for k, v in row.items() if k != "workers/restarts"} for row in without_times(run.metrics)]
    assert kept == [{k: v for k, v in row.items() if k != "workers/restarts"} for row in without_times(local.metrics)]
    for step in range(1, STEPS + 1):
        ours, theirs = run.records(step), local.records(step)
        assert len(ours) == len(theirs) == 16
        for one, other in zip(ours, theirs, strict=True):
            for column in ("token_ids", "loss_mask", "logprobs", "versions"):
                mine, yours = (list(getattr(record.trajectory, column)) for record in (one, other))
                assert mine == yours, (step, column)
            assert one.trajectory.reward == other.trajectory.reward


def finished(run: Background) -> Run:
    code, out = run.finish(timeout=300)
    assert code == 0, out
    return Run(code, out, "", run.dir)


def test_it_is_the_local_run_to_the_bit_and_uses_both_nodes(
    on_ray: Any, local: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # What would give Ray's workers another interpreter, other modules or a failing start.
    monkeypatch.setenv("RAY_RUNTIME_ENV_HOOK", "no_such_module.hook")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "1")
    (tmp_path / "numpy.py").write_text("raise ImportError('the wrong numpy')")
    run = on_ray("cluster.env={SHOWN: here}")
    run.wait_for_steps(1, timeout=300)
    processes = processes_of_runs()
    assert processes.keys() == ALL
    environment = processes["agent_worker1"].environ()
    assert environment["SHOWN"] == "here"
    assert not [name for name in environment if name.startswith("RAY_")], "tools would inherit Ray's token"
    parents = {process.parent() for process in processes.values()}
    assert len({parent.parent().pid for parent in parents if parent}) == 2, "one raylet has started them all"
    ended = finished(run)
    assert_equal(ended, local)
    assert nothing_is_left()
    for name in ("trainer_rank1", "agent_worker1", "server"):
        assert (run.dir / "logs" / f"{name}.log").exists()
    assert all(node in ended.out for node in NODES)
    texts = [path.read_text() for path in run.dir.rglob("*") if path.suffix in (".json", ".log", ".jsonl")]
    assert not any("CONNECTION_KEY" in text for text in texts)


def test_a_killed_agent_worker_and_server_are_started_again_and_change_nothing(on_ray: Any, local: Run) -> None:
    run = on_ray()
    run.wait_for_steps(1, timeout=300)
    processes = processes_of_runs()
    processes["agent_worker0"].kill()
    run.wait_for_steps(2, timeout=300)
    processes["rollout_server"].kill()
    ended = finished(run)
    assert "the rollout server died" in ended.out
    assert "agent worker 0 was killed (SIGKILL" in ended.out
    assert_equal(ended, local)


def test_after_a_killed_rank_the_run_goes_on_and_a_killed_driver_leaves_nothing(on_ray: Any, local: Run) -> None:
    run = on_ray()
    run.wait_for_steps(1, timeout=300)
    processes_of_runs()["trainer_rank1"].kill()
    run.wait_for_steps(2, timeout=300)  # which needs both ranks
    assert processes_of_runs().keys() == ALL
    run.process.kill()
    out, _ = run.process.communicate()
    assert "trainer rank 1 died" in out and "the run goes on by itself from" in out, out
    assert nothing_is_left()
    assert_equal(finished(on_ray("--resume")), local)


def test_a_cluster_of_its_own_ends_with_a_killed_run(background: Any) -> None:
    run = background("run.steps=1000", "eval.before_train=false", "cluster.kind=ray", "cluster.agents.workers=1")
    run.wait_for_steps(1, timeout=300)
    children = run.children("")
    assert any("raylet" in child.name() for child in children)
    os.kill(run.process.pid, 9)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


def test_agent_workers_of_a_lost_node_are_placed_on_others(background: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third node has room for an agent worker only: rank and server take two CPUs each."""
    environment = variables()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with cluster(environment, "127.0.0.4:1") as address:
        run = background(
            "run.steps=30", "eval.before_train=false", "eval.every=null", "trainer.threads=2", "rollout.threads=2",
            "rollout.deterministic=false", "cluster.agents.workers=3", "cluster.kind=ray", f"cluster.address={address}",
        )  # fmt: skip
        run.wait_for_steps(1, timeout=300)
        raylets = {name: process.parent().parent() for name, process in processes_of_runs().items()}  # type: ignore[union-attr]
        kept = {raylets["trainer_rank0"], raylets["rollout_server"]}
        (lost,) = (name for name, raylet in raylets.items() if raylet not in kept)
        worker = processes_of_runs()[lost]
        raylets[lost].kill()
        worker.kill()
        ended = finished(run)
    assert f"agent worker {lost[-1]} was killed" in ended.out
    rows = [row for row in ended.metrics if "reward/mean" in row]
    assert [row["step"] for row in rows] == list(range(1, 31))
    assert all(row["episode/count"] == 16 and row["episode/failed"] == 0 for row in rows)
    assert rows[-1]["workers/restarts"] >= 1
