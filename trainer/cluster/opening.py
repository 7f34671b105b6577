"""The launcher that a recipe names, for the length of a run."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from agentloop.config import Recipe
from agentloop.launch.base import Launcher
from agentloop.launch.listener import Listener
from agentloop.launch.local import LocalLauncher
from trainer.cluster.needs import cpus_of, needs_of
from trainer.console.console import Console


@contextlib.asynccontextmanager
async def open_launcher(recipe: Recipe, console: Console) -> AsyncIterator[Launcher]:
    """Yield what starts the processes of a run. At the end, those that still run are ended.

    Raises:
        ConfigError: the cluster cannot be joined, has no room, or has other interpreters.
    """
    if recipe.cluster.kind == "local":
        yield LocalLauncher()
        return

    from trainer.cluster.interpreters import check_nodes
    from trainer.cluster.placement import placed
    from trainer.cluster.ray import RayLauncher
    from trainer.cluster.session import session

    needs = needs_of(recipe)
    async with AsyncExitStack() as stack:
        with console.phase("join the Ray cluster" if recipe.cluster.address else "start a Ray cluster"):
            joined = await stack.enter_async_context(session(recipe, cpus_of(needs)))
        placement = await stack.enter_async_context(placed(needs, console, recipe.cluster.timeout_s, own=joined.own))
        if not joined.own:
            with console.phase("compare interpreters"):
                await check_nodes(await asyncio.to_thread(lambda: placement.nodes))
        console.notice("places: " + await asyncio.to_thread(placement.text))

        listener = Listener.open("127.0.0.1" if joined.one_machine else joined.address)
        stack.push_async_callback(listener.close)
        launcher = RayLauncher(joined, placement, listener, recipe.cluster.env)
        stack.push_async_callback(launcher.close)
        yield launcher
