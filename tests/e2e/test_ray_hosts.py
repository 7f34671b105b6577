"""A run on two hosts, as far as the kernel's network is concerned: two namespaces that a pair of devices connects."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.ray_cluster import variables

from .conftest import Background, Run, agentloop_command, train_quickstart
from .test_ray import OPTIONS, assert_equal

pytestmark = pytest.mark.ray

ADDRESSES = ("10.177.0.1", "10.177.0.2")
PORT = 6379
START_S = 120.0
CUT_S = 5.0


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Hosts:
    """Two namespaces without a route to anywhere else."""

    def __init__(self) -> None:
        self.names = tuple(f"agentloop{os.getpid()}{side}" for side in "ab")
        self.devices = tuple(f"al{os.getpid()}{side}" for side in "ab")

    def make(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        one, other = self.names
        ip(
            "link",
            "add",
            self.devices[0],
            "netns",
            one,
            "type",
            "veth",
            "peer",
            "name",
            self.devices[1],
            "netns",
            other,
        )
        for name, device, address in zip(self.names, self.devices, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def command(self, host: int, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.names[host], *words]

    def connected(self, yes: bool) -> None:
        ip("-n", self.names[1], "link", "set", self.devices[1], "up" if yes else "down")

    def remove(self) -> None:
        for name in self.names:
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
            processes = [psutil.Process(int(pid)) for pid in pids.split() if psutil.pid_exists(int(pid))]
            for process in processes:
                process.kill()
            psutil.wait_procs(processes, timeout=30)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.fixture
def hosts(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    """Two hosts with a Ray node on each."""
    if os.getuid() or not shutil.which("ip"):
        pytest.skip("namespaces need root and iproute2: apt-get install iproute2; sudo make test-ray")
    for name, value in variables().items():
        monkeypatch.setenv(name, value)
    log = tmp_path_factory.mktemp("hosts") / "ray.log"
    made = Hosts()
    folder = Path("/tmp") / f"ray{os.getpid()}"  # short: the names of Ray's sockets are limited
    try:
        made.make()
        head = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={folder}"]
        for host, words in enumerate((head, [f"--address={ADDRESSES[0]}:{PORT}"])):
            ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=3", *words]
            size = "--object-store-memory=83886080"
            with log.open("ab") as output:
                subprocess.Popen(
                    made.command(host, *ray, f"--node-ip-address={ADDRESSES[host]}", size), stdout=output, stderr=output
                )
            wait_for_nodes(made, host + 1, log)
        yield made
    finally:
        made.remove()
        shutil.rmtree(folder, ignore_errors=True)


ASK = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"


def wait_for_nodes(hosts: Hosts, count: int, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        asked = subprocess.run(
            hosts.command(0, sys.executable, "-c", ASK, f"{ADDRESSES[0]}:{PORT}"), capture_output=True, text=True,
            check=False, timeout=START_S,
        )  # fmt: skip
        if asked.stdout.strip().endswith(str(count)):
            return
        time.sleep(0.5)
    raise AssertionError(log.read_text() + asked.stderr)


def test_it_is_the_local_run_to_the_bit_also_when_the_network_is_cut_for_a_while(
    hosts: Hosts, repo: Path, tmp_path: Path, run_forked: Callable[..., Run]
) -> None:
    options = (*OPTIONS, "cluster.nodes=2", "rollout.publish.transport=distributed")
    (tmp_path / "local").mkdir()
    local = run_forked(tmp_path / "local", *train_quickstart(repo, "run", (*OPTIONS, options[-1])))
    assert local.code == 0, local.err

    words = train_quickstart(repo, "run", (*options, "cluster.kind=ray", f"cluster.address={ADDRESSES[0]}:{PORT}"))
    run = OnHost(hosts.command(0, *agentloop_command(*words)), tmp_path)
    run.wait_for_steps(1, timeout=300)
    hosts.connected(False)
    time.sleep(CUT_S)
    hosts.connected(True)
    code, out = run.finish(timeout=300)
    assert code == 0, out
    assert all(address in out for address in ADDRESSES)
    assert_equal(Run(code, out, "", run.dir), local)


class OnHost(Background):
    """A run in a namespace."""

    def __init__(self, command: list[str], cwd: Path) -> None:
        self.process: Any = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd
        )
        self.dir = cwd / "outputs" / "run"
