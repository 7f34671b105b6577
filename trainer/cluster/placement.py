"""Reserve places on the cluster's nodes, with a bound."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from agentloop.errors import ConfigError
from agentloop.launch.base import Role
from trainer.cluster.needs import Need, Node, lacking, table
from trainer.console.console import Console

LOOK_S = 0.2


@dataclass(frozen=True)
class Place:
    """A reserved place: what Ray calls a bundle of a placement group."""

    group: Any
    index: int
    gpus: float


class Placement:
    """The places of a run, by role and number of the process."""

    def __init__(self, needs: Sequence[Need], groups: Sequence[Any]) -> None:
        self._places: dict[Role, list[Place]] = {}
        for need, group in zip(needs, groups, strict=True):
            self._places.setdefault(need.role, []).extend(
                Place(group, index, place.get("GPU", 0)) for index, place in enumerate(need.places)
            )

    def place(self, role: Role, number: int) -> Place:
        """Return the place of a process. One beyond the number of places shares one."""
        places = self._places[role]
        return places[number % len(places)]

    def address(self, role: Role, number: int) -> str:
        """Return the address of the node that a process is placed on."""
        from ray.util import placement_group_table

        place = self.place(role, number)
        node = placement_group_table(place.group)["bundles_to_node_id"][place.index]
        return next(found.address for found in nodes() if found.id == node)

    @property
    def nodes(self) -> list[Node]:
        """The nodes that have places."""
        from ray.util import placement_group_table

        groups = {place.group.id.hex(): place.group for places in self._places.values() for place in places}
        ids = {
            node for group in groups.values() for node in placement_group_table(group)["bundles_to_node_id"].values()
        }
        return [node for node in nodes() if node.id in ids]

    def text(self) -> str:
        """Return who goes where, for the user."""
        where: dict[str, list[str]] = {}
        for role, places in self._places.items():
            for number in range(len(places)):
                where.setdefault(self.address(role, number), []).append(f"{role} {number}")
        return "; ".join(f"{address}: {', '.join(names)}" for address, names in where.items())


def nodes() -> list[Node]:
    """Return the nodes of the cluster that are alive."""
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return [
        Node(node["NodeID"], str(node["NodeManagerAddress"]), node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"]
    ]


@contextlib.asynccontextmanager
async def placed(needs: Sequence[Need], console: Console, timeout_s: float, *, own: bool) -> AsyncIterator[Placement]:
    """Reserve places, and give them back afterwards.

    Args:
        timeout_s: how long to wait for room.
        own: nobody else uses the cluster, so that waiting is in vain.

    Raises:
        ConfigError: there was no room in time; names what is asked for and what each node has.
    """
    from ray.util import placement_group, remove_placement_group

    lacks = await asyncio.to_thread(lambda: lacking(needs, nodes()))
    if lacks and own:
        raise _no_room(needs, lacks, "this machine")
    if lacks:
        known = await asyncio.to_thread(nodes)
        console.notice(f"the cluster has no room yet, waiting {timeout_s:.0f} s at most:\n" + table(needs, known))
    groups = [placement_group([dict(place) for place in need.places], strategy=need.strategy) for need in needs]
    try:
        with console.phase("reserve places on the cluster"):
            await _until_ready(groups, needs, console, timeout_s)
        yield Placement(needs, groups)
    finally:
        for group in groups:
            with contextlib.suppress(Exception):
                remove_placement_group(group)


def _pending(groups: Sequence[Any]) -> list[Any]:
    return [group for group in groups if not group.wait(0.01)]


async def _until_ready(groups: Sequence[Any], needs: Sequence[Need], console: Console, timeout_s: float) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    waiting = list(groups)
    while True:
        # One that cannot be met stays pending for ever, without an error.
        waiting = await asyncio.to_thread(_pending, waiting)
        if not waiting:
            return
        console.phase_progress(len(groups) - len(waiting), len(groups))
        if loop.time() > deadline:
            late = [need.what for need, group in zip(needs, groups, strict=True) if group in waiting]
            raise _no_room(needs, late, f"the cluster, after {timeout_s:.0f} s")
        await asyncio.sleep(LOOK_S)


def _no_room(needs: Sequence[Need], lacks: Sequence[str], where: str) -> ConfigError:
    return ConfigError(
        f"there is no room on {where} for " + "; ".join(lacks) + "\n" + table(needs, nodes()),
        "ask for less (trainer.ranks, trainer.threads, rollout.replicas, cluster.agents, cluster.nodes), add nodes, or "
        "raise cluster.timeout_s",
    )
