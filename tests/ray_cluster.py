"""A Ray cluster of two nodes on this machine, in a process of its own.

Ray reads its settings when it is imported, once a process. As a program, it prints the cluster's address and ends
the cluster when its input ends.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NODES = ("127.0.0.2", "127.0.0.3")
"""Nodes at 127.0.0.1 cannot be joined: Ray replaces that address."""

CPUS = 4
SOON = {
    "health_check_period_ms": 500, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 3,
    "health_check_initial_delay_ms": 1000,
}  # fmt: skip
"""A node that does not answer is dead after a second; by default it takes a quarter of a minute."""


def variables() -> dict[str, str]:
    """Return the environment of a cluster, and of what joins it."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}


@contextlib.contextmanager
def cluster(environment: dict[str, str], *more: str) -> Iterator[str]:
    """Yield the address of a cluster.

    Args:
        more: further nodes, as address:cpus.
    """
    program = subprocess.Popen(
        [sys.executable, str(Path(__file__)), *more],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **environment},
    )  # fmt: skip
    assert program.stdin is not None and program.stdout is not None
    try:
        lines = []
        while not (line := program.stdout.readline()).startswith("address "):
            lines.append(line)
            assert line, f"the cluster was not started: {''.join(lines)}"
        yield line.split()[1]
    finally:
        program.stdin.close()
        program.wait(60)
        program.stdout.close()


def main() -> None:
    from ray.cluster_utils import Cluster

    options: dict[str, Any] = {"object_store_memory": 80 * 2**20}
    head = {"node_ip_address": NODES[0], "num_cpus": CPUS, "include_dashboard": False, "_system_config": SOON}
    started = Cluster(initialize_head=True, head_node_args={**head, **options})
    for node in (f"{NODES[1]}:{CPUS}", *sys.argv[1:]):
        address, cpus = node.split(":")
        started.add_node(node_ip_address=address, num_cpus=int(cpus), **options)
    print("address", started.address, flush=True)
    sys.stdin.read()
    started.shutdown()


if __name__ == "__main__":
    main()
