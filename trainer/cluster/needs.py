"""What a run asks of a cluster, and what the cluster lacks. Pure: nothing here talks to Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agentloop.config import Recipe
from agentloop.launch.base import Role

Resources = Mapping[str, float]

PACKED = "STRICT_PACK"
"""All on one node."""

SPREAD = "SPREAD"
"""On as many nodes as there are."""

SHOWN = ("CPU", "GPU")


@dataclass(frozen=True)
class Need:
    """Places that are reserved together.

    Attributes:
        role: of the processes, one for each place.
        what: for messages.
        places: resources of each.
        strategy: how Ray divides them over nodes.
    """

    role: Role
    what: str
    places: tuple[Resources, ...]
    strategy: str


@dataclass(frozen=True)
class Node:
    """A node of the cluster: what it has, and what of that nobody has reserved."""

    id: str
    address: str
    total: Resources
    free: Resources


def needs_of(recipe: Recipe) -> list[Need]:
    """Return what a run asks for: ranks by node, the rollout server, agent workers."""
    trainer, rollout, cluster = recipe.trainer, recipe.rollout, recipe.cluster
    rank = _resources(trainer.threads, gpus=int(trainer.device == "cuda"))
    needs = []
    each = ranks_per_node(recipe)
    for first in range(0, trainer.ranks, each):
        last = min(first + each, trainer.ranks) - 1
        what = f"trainer rank {first}" if first == last else f"trainer ranks {first} to {last}"
        needs.append(Need("rank", what, (rank,) * (last - first + 1), PACKED))
    if rollout.url is None:
        per_replica = rollout.gpus_per_replica if rollout.engine == "sglang" else 1
        gpus = rollout.replicas * per_replica if rollout.device.startswith("cuda") else 0
        needs.append(Need("server", "rollout server", (_resources(rollout.threads * rollout.replicas, gpus),), PACKED))
    if workers := cluster.agents.workers:
        one = _resources(cluster.agents.cpus)
        needs.append(Need("agent", f"{workers} agent worker{'s' * (workers > 1)}", (one,) * workers, SPREAD))
    return needs


def ranks_per_node(recipe: Recipe) -> int:
    """Return how many ranks are placed together."""
    return -(-recipe.trainer.ranks // recipe.cluster.nodes)


def cpus_of(needs: Sequence[Need]) -> int:
    """Return the CPUs of all places together."""
    return int(-(-sum(place.get("CPU", 0) for need in needs for place in need.places) // 1))


def lacking(needs: Sequence[Need], nodes: Sequence[Node]) -> list[str]:
    """Return what does not fit into what is free, largest nodes first; empty if all fits."""
    left = [dict(node.free) for node in sorted(nodes, key=lambda node: -node.free.get("GPU", 0))]
    lacks = []
    for need in needs:
        groups = [need.places] if need.strategy == PACKED else [(place,) for place in need.places]
        missing = [group for group in groups if not _take(_sum(group), left)]
        if missing:
            lacks.append(f"{need.what}: {_text(_sum([_sum(group) for group in missing]))}" + _together(need))
    return lacks


def table(needs: Sequence[Need], nodes: Sequence[Node]) -> str:
    """Return what is asked for, and what each node has free of its total, a line each."""
    lines = [f"  asked: {need.what}: {_text(_sum(need.places))}{_together(need)}" for need in needs]
    for node in nodes:
        free = ", ".join(
            f"{node.free.get(name, 0):g} of {node.total.get(name, 0):g} {name}s free"
            for name in SHOWN
            if node.total.get(name)
        )
        lines.append(f"  node {node.address}: {free or 'no CPUs or GPUs'}")
    return "\n".join(lines)


def _resources(cpus: float, gpus: int = 0) -> Resources:
    return {"CPU": cpus, **({"GPU": gpus} if gpus else {})}


def _together(need: Need) -> str:
    return " on one node" if need.strategy == PACKED and len(need.places) > 1 else ""


def _sum(places: Sequence[Resources]) -> dict[str, float]:
    names = dict.fromkeys(name for place in places for name in place)
    return {name: sum(place.get(name, 0) for place in places) for name in names}


def _take(wanted: Resources, left: list[dict[str, float]]) -> bool:
    """Take resources from the first node that has them."""
    for node in left:
        if all(node.get(name, 0) >= amount for name, amount in wanted.items()):
            for name, amount in wanted.items():
                node[name] = node.get(name, 0) - amount
            return True
    return False


def _text(resources: Resources) -> str:
    return ", ".join(f"{amount:g} {name}{'s' * (amount != 1)}" for name, amount in resources.items() if amount)
