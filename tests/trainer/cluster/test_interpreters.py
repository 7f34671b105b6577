"""A node with other packages or other code is refused, and the user sees both lists."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agentloop.errors import ConfigError
from tests.ray_cluster import NODES, cluster, variables
from trainer.cluster.interpreters import require_same

OURS = {"python": "CPython 3.11.7", "executable": "/venv/bin/python", "numpy": "2.4.0", "code of trainer": "aaaa"}


def test_equal_environments_are_accepted() -> None:
    require_same(OURS, dict(OURS), "10.0.0.2")


@pytest.mark.parametrize(
    ("theirs", "named"),
    [
        ({**OURS, "numpy": "1.26.4"}, "numpy"),
        ({**OURS, "code of trainer": "bbbb"}, "code of trainer"),
        ({**OURS, "code of own_reward": "cccc"}, "code of own_reward"),
        ({name: value for name, value in OURS.items() if name != "numpy"}, "numpy"),
    ],
)
def test_what_differs_is_named_and_marked_in_both_lists(theirs: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=r"node 10\.0\.0\.2 has another environment") as refused:
        require_same(OURS, theirs, "10.0.0.2")
    assert f"({named}):" in refused.value.message
    rows = [line for line in refused.value.message.splitlines() if line.strip().startswith("*")]
    assert [row.split("  ")[1].strip("* ") for row in rows] == [named]
    assert rows[0].split()[-2:] == [OURS.get(named, "-"), theirs.get(named, "-")]
    assert "/venv/bin/python" in refused.value.message and "same path on every node" in str(refused.value)


def test_a_node_without_the_interpreter_is_named() -> None:
    with pytest.raises(ConfigError, match=r"node 10\.0\.0\.2 cannot run this project: the interpreter /venv"):
        require_same(OURS, "the interpreter /venv/bin/python does not exist on this node", "10.0.0.2")


ASK = """
import asyncio, sys
from pathlib import Path
from agentloop.config import Recipe
from agentloop.config.loading import load_config
from agentloop.errors import AgentloopError
from trainer.cluster.interpreters import check_nodes
from trainer.cluster.placement import nodes
from trainer.cluster.session import session

async def main():
    words = ["cluster.kind=ray", f"cluster.address={sys.argv[1]}"]
    recipe = load_config(Recipe, Path("recipes/quickstart/recipe.yaml"), words)
    async with session(recipe, 1):
        for python in sys.argv[2:]:
            try:
                await check_nodes(nodes(), python=python)
                print("accepted", python)
            except AgentloopError as exc:
                print("refused", python, exc)

asyncio.run(main())
"""


@pytest.mark.ray
def test_nodes_of_a_cluster_are_asked(repo: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "other")], check=True)
    other = tmp_path / "other" / "bin" / "python"
    (site,) = (tmp_path / "other" / "lib").glob("python*/site-packages")
    (site / "numpy-1.0.dist-info").mkdir()
    (site / "numpy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.0\n")
    missing = tmp_path / "missing" / "python"
    environment = variables()
    with cluster(environment) as address:
        asked = subprocess.run(
            [sys.executable, "-c", ASK, address, sys.executable, str(other), str(missing)],
            capture_output=True, text=True, cwd=repo, env={**os.environ, **environment, "PYTHONPATH": str(repo)},
            timeout=300,
        )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    accepted, refused = asked.stdout.split("refused", 1)
    assert accepted.strip() == f"accepted {sys.executable}"
    first, second = refused.split("refused", 1)
    assert any(f"node {node}" in first for node in NODES) and "* numpy" in first
    assert str(other) in first and sys.executable in first
    assert "the interpreter" in second and "does not exist on this node" in second
