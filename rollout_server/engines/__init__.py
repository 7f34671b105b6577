"""Engines: what turns token ids into token ids. `create_engine` imports the one that is asked for, and only that."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

from agentloop.config.server import ServerSettings
from agentloop.errors import RegistryError
from rollout_server.engines.base import Engine

ENGINE_GROUP = "agentloop.engines"

EngineFactory = Callable[[ServerSettings], Engine]


def engine_factory(name: str) -> EngineFactory:
    """The factory of engine `name`: the embedded `torch`, or one that a package registered in `agentloop.engines`.

    Raises:
        RegistryError: nobody registered that name, or its entry point cannot be loaded.
    """
    if name == "torch":
        from rollout_server.engines.torch_engine.engine import create_torch_engine

        return create_torch_engine
    registered = {entry.name: entry for entry in entry_points(group=ENGINE_GROUP)}
    if name not in registered:
        known = ", ".join(sorted({"torch", *registered}))
        raise RegistryError(f"no engine is called {name!r}", f"known engines: {known}")
    try:
        factory: EngineFactory = registered[name].load()
    except Exception as exc:  # whatever a foreign module raises at import, it is named here
        raise RegistryError(
            f"the engine {name!r} ({registered[name].value}) cannot be loaded: {exc!r}", "reinstall its package"
        ) from exc
    return factory
