"""Join a Ray cluster, or start one on this machine for one run."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import psutil

from agentloop.config import Recipe
from agentloop.errors import ConfigError, WorkerError
from trainer.cluster.own import own_cluster

JOIN_S = 60.0
"""Time to join a cluster: Ray waits for minutes at a wrong address."""

CHOSEN = {
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` it gives workers another interpreter
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
HOOK = "RAY_RUNTIME_ENV_HOOK"
"""Names a function that may change the environment of every actor."""

LOOPBACK = "127."


@dataclass(frozen=True)
class Session:
    """A connection to a cluster.

    Attributes:
        own: it was started for this run, on this machine.
        address: of the node that this process is on.
        one_machine: all its nodes are on this machine.
    """

    own: bool
    address: str
    one_machine: bool


def check_ray(recipe: Recipe) -> None:
    """Refuse what would join the wrong cluster, or none.

    Raises:
        ConfigError: Ray is not installed, or RAY_ADDRESS names a cluster that the recipe does not.
    """
    cluster = recipe.cluster
    if cluster.kind != "ray":
        return
    if find_spec("ray") is None:
        raise ConfigError("cluster.kind=ray: Ray is not installed", "pip install 'agentloop-rl[ray]'")
    named = os.environ.get("RAY_ADDRESS")
    if named and cluster.address not in ("auto", named):
        meant = "starts a cluster on this machine" if cluster.address is None else f"joins {cluster.address}"
        raise ConfigError(
            f"RAY_ADDRESS is {named}, but this run {meant} (cluster.address)",
            "unset RAY_ADDRESS, or set cluster.address=auto to use it",
        )


@contextlib.asynccontextmanager
async def session(recipe: Recipe, cpus: int) -> AsyncIterator[Session]:
    """Join the cluster of `cluster.address`, or start one; leave it afterwards.

    Args:
        cpus: that a cluster of this run's own has at least.

    Raises:
        ConfigError: no cluster answers at the address, or it has another version of Ray.
    """
    # Ray reads them when it is imported.
    os.environ.update(CHOSEN)
    os.environ.pop(HOOK, None)
    async with AsyncExitStack() as stack:
        address = recipe.cluster.address
        if address is None:
            # Without these two, Ray writes a token into the home folder. They do not stay in the
            # environment, which programs started by tools inherit.
            token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
            os.environ.update(token)
            for name in token:
                stack.callback(os.environ.pop, name, None)
            address = await stack.enter_async_context(own_cluster(cpus))
        stack.push_async_callback(asyncio.to_thread, _leave)
        joined = await _join(address, own=recipe.cluster.address is None)
        if joined.own:
            os.environ.pop("RAY_AUTH_TOKEN")
        yield joined


async def _join(address: str, *, own: bool) -> Session:
    joining = asyncio.ensure_future(asyncio.to_thread(_init, address, own))
    try:
        async with asyncio.timeout(JOIN_S):
            return await asyncio.shield(joining)
    except TimeoutError:
        raise ConfigError(
            f"no Ray cluster answered at {address} within {JOIN_S:.0f} s",
            "check cluster.address with `ray status --address ...`; nodes at 127.0.0.1 cannot be joined",
        ) from None


def _init(address: str, own: bool) -> Session:
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)  # it warns that this is not the main thread
    namespace = f"agentloop-{secrets.token_hex(4)}"
    try:
        ray.init(address=address, namespace=namespace, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError, OSError) as exc:
        text = " ".join(str(exc).strip().splitlines()[:4])
        raise ConfigError(
            f"the Ray cluster at {address} could not be joined: {text}",
            "cluster.address must name a cluster of this version of Ray and Python; RAY_AUTH_MODE and RAY_AUTH_TOKEN "
            "must be those of the cluster",
        ) from exc
    found = str(ray.util.get_node_ip_address())
    ours = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    nodes = [str(node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]]
    return Session(own, found, all(node in ours or node.startswith(LOOPBACK) for node in nodes))


def _leave() -> None:
    import ray

    with contextlib.suppress(Exception):
        ray.shutdown()


async def answer(reference: Any, timeout_s: float, what: str) -> Any:
    """Wait for the answer of an actor.

    Raises:
        WorkerError: it has died, or does not answer in time.
    """
    from ray.exceptions import RayError

    try:
        async with asyncio.timeout(timeout_s):
            return await reference
    except TimeoutError:
        raise WorkerError(f"{what}: Ray did not answer within {timeout_s:.0f} s", "see `ray status`") from None
    except RayError as exc:
        first = next(iter(str(exc).strip().splitlines()), type(exc).__name__)
        raise WorkerError(f"{what}: {first}", "see `ray status`, and Ray's logs on that node") from exc
