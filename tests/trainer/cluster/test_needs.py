"""What a run asks of a cluster, and what a user reads when it is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentloop.config import Recipe
from agentloop.config.loading import load_config
from agentloop.errors import ConfigError
from trainer.cluster.needs import Node, cpus_of, lacking, needs_of, table
from trainer.cluster.session import check_ray


def recipe(repo: Path, *overrides: str) -> Recipe:
    return load_config(Recipe, repo / "recipes" / "quickstart" / "recipe.yaml", ["cluster.kind=ray", *overrides])


def node(address: str, free: dict[str, float], total: dict[str, float] | None = None) -> Node:
    return Node(address, address, total or free, free)


def test_ranks_are_divided_over_nodes_and_each_needs_its_gpu(repo: Path) -> None:
    needs = needs_of(
        recipe(
            repo, "trainer.ranks=5", "cluster.nodes=2", "trainer.device=cuda", "trainer.threads=2",
            "rollout.device=cuda", "rollout.replicas=3", "cluster.agents.workers=2", "cluster.agents.cpus=0.5",
        )
    )  # fmt: skip
    assert [(need.what, need.strategy, [dict(place) for place in need.places]) for need in needs] == [
        ("trainer ranks 0 to 2", "STRICT_PACK", [{"CPU": 2, "GPU": 1}] * 3),
        ("trainer ranks 3 to 4", "STRICT_PACK", [{"CPU": 2, "GPU": 1}] * 2),
        ("rollout server", "STRICT_PACK", [{"CPU": 3, "GPU": 3}]),
        ("2 agent workers", "SPREAD", [{"CPU": 0.5}] * 2),
    ]
    assert cpus_of(needs) == 14


def test_a_server_elsewhere_needs_no_place(repo: Path) -> None:
    needs = needs_of(recipe(repo, "rollout.url=http://10.0.0.1:30000"))
    assert [need.what for need in needs] == ["trainer rank 0"]


def test_what_fits_on_no_node_is_named_with_what_each_has(repo: Path) -> None:
    needs = needs_of(recipe(repo, "trainer.ranks=3", "cluster.agents.workers=4"))
    nodes = [node("10.0.0.1", {"CPU": 2}, {"CPU": 8}), node("10.0.0.2", {"CPU": 2})]
    assert lacking(needs, nodes) == ["trainer ranks 0 to 2: 3 CPUs on one node", "4 agent workers: 1 CPU"]
    text = table(needs, nodes)
    assert "asked: trainer ranks 0 to 2: 3 CPUs on one node" in text
    assert "node 10.0.0.1: 2 of 8 CPUs free" in text and "node 10.0.0.2: 2 of 2 CPUs free" in text
    assert lacking(needs, [*nodes, node("10.0.0.3", {"CPU": 4})]) == []


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["cluster.kind=local", "cluster.address=auto"], "cluster.address is for cluster.kind=ray"),
        (["cluster.kind=local", "cluster.nodes=2", "trainer.ranks=2"], "cluster.nodes is for cluster.kind=ray"),
        (["cluster.kind=local", "cluster.env={A: b}"], "cluster.env is for cluster.kind=ray"),
        (["cluster.nodes=2"], "cluster.nodes 2 is more than trainer.ranks 1"),
        (["cluster.address=http://10.0.0.1:6379"], "cluster.address"),
        (["rollout.colocated=true"], "cluster.kind=local"),
    ],
)
def test_keys_that_have_no_effect_are_refused(repo: Path, overrides: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        recipe(repo, *overrides)


@pytest.mark.parametrize(
    ("address", "refused"),
    [("null", True), ("auto", False), ("10.0.0.1:6379", False), ("10.0.0.2:6379", True)],
)
@pytest.mark.ray
def test_a_stray_ray_address_is_refused(
    repo: Path, monkeypatch: pytest.MonkeyPatch, address: Any, refused: bool
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    chosen = recipe(repo, f"cluster.address={address}")
    if not refused:
        check_ray(chosen)
        return
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS is 10.0.0.1:6379, but this run"):
        check_ray(chosen)


def test_without_ray_the_extra_is_named(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.cluster.session.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="Ray is not installed"):
        check_ray(recipe(repo))
