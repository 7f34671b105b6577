"""Refuse nodes whose Python, packages or code differ from this machine's.

Ray compares its own version and Python's, nothing else. A node with another numpy computes other
numbers without a word, or fails somewhere in a library with a text about something else.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentloop.errors import ConfigError, WorkerError
from agentloop.launch import fingerprint
from agentloop.runtime.early import ROOT
from trainer.cluster.needs import Node
from trainer.cluster.ray import node_actor
from trainer.cluster.session import answer

PROBE_S = 120.0
"""Time for a node to answer; its packages may lie on a slow disk."""

Fingerprint = Mapping[str, str]

WAYS_OUT = (
    "install the same environment and code at the same path on every node; or start this command with an interpreter "
    "that they all share; or take the node out of the cluster"
)


async def check_nodes(nodes: Sequence[Node], *, python: str = sys.executable) -> None:
    """Compare the interpreters of nodes with this machine's.

    Args:
        python: interpreter that is asked on the nodes.

    Raises:
        ConfigError: one differs; both lists are in the message.
        WorkerError: a node did not answer.
    """
    mine = asyncio.create_task(_local())
    try:
        found = await asyncio.gather(*(_of_node(node, python) for node in nodes))
        ours = await mine
    finally:
        mine.cancel()
    for node, theirs in zip(nodes, found, strict=True):
        require_same(ours, theirs, node.address)


def require_same(ours: Fingerprint, theirs: Fingerprint | str, address: str) -> None:
    """Compare a node's answer with this machine's.

    Args:
        theirs: its fingerprint, or why it has none.

    Raises:
        ConfigError: they differ.
    """
    if isinstance(theirs, str):
        raise ConfigError(f"node {address} cannot run this project: {theirs}", WAYS_OUT)
    if differing := [name for name in {**ours, **theirs} if ours.get(name, "-") != theirs.get(name, "-")]:
        raise ConfigError(
            f"node {address} has another environment than this machine ({', '.join(differing)}):\n"
            + side_by_side(ours, theirs, address),
            WAYS_OUT,
        )


def side_by_side(ours: Fingerprint, theirs: Fingerprint, address: str) -> str:
    """Return both lists as a table; what differs is marked with `*`."""
    rows = [("", "this machine", f"node {address}")]
    rows += [(name, ours.get(name, "-"), theirs.get(name, "-")) for name in {**ours, **theirs}]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(
        f"  {'*' if at and mine != other else ' '} {name:<{widths[0]}}  {mine:<{widths[1]}}  {other}"
        for at, (name, mine, other) in enumerate(rows)
    )


async def _local() -> Fingerprint:
    process = await asyncio.create_subprocess_exec(
        *_command(sys.executable), env=_variables(), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    found: Fingerprint = json.loads(output)
    return found


async def _of_node(node: Node, python: str) -> Fingerprint | str:
    """Return the fingerprint of a node, or why it has none."""
    actor: Any = node_actor(node.id)
    what = f"node {node.address} could not be asked for its interpreter"
    try:
        started = await answer(actor.begin.remote(_command(python), _variables(), [], str(Path.cwd())), PROBE_S, what)
        if isinstance(started, str):
            return started
        text, code = b"", None
        while code is None:
            more, code, _ = await answer(actor.follow.remote(), PROBE_S, what)
            text += more
    finally:
        _give_back(actor)
    try:
        found: Fingerprint = json.loads(text)
    except ValueError:
        raise WorkerError(f"{what}: {text.decode(errors='replace')[-2000:]}", WAYS_OUT) from None
    return found


def _command(python: str) -> list[str]:
    return [python, "-P", "-c", Path(fingerprint.__file__).read_text()]


def _variables() -> dict[str, str]:
    return {"PYTHONPATH": ROOT}


def _give_back(actor: Any) -> None:
    import ray

    ray.kill(actor)
