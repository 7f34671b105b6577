"""Engines sample token ids from token ids; they do not handle text.

In: a `Generation` (prompt ids, sampling parameters). Out: a `GenerationResult` (ids, logprobs,
version spans). `base.py` is the interface: the data and the `Engine` protocol. `torch_engine/` is
the embedded engine. `engine_factory` finds an engine by name, also in installed packages, and
imports only that one. SGLang is not an engine in this sense: it runs in another process, behind
`rollout_server/replica`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

from agentloop.config.server import ServerSettings
from agentloop.errors import RegistryError
from rollout_server.engines.base import Engine

ENGINE_GROUP = "agentloop.engines"

EngineFactory = Callable[[ServerSettings], Engine]


def engine_factory(name: str) -> EngineFactory:
    """Return the factory of engine `name`: `torch`, or one registered in `agentloop.engines`.

    Raises:
        RegistryError: the name is not registered, or its entry point cannot be loaded.
    """
    if name == "torch":
        from rollout_server.engines.torch_engine.create import create_torch_engine

        return create_torch_engine

    registered = {entry.name: entry for entry in entry_points(group=ENGINE_GROUP)}
    if name not in registered:
        known = ", ".join(sorted({"torch", *registered}))
        raise RegistryError(f"unknown engine {name!r}", f"known engines: {known}")
    try:
        factory: EngineFactory = registered[name].load()
    except Exception as exc:  # a third-party module may raise anything at import
        raise RegistryError(
            f"engine {name!r} ({registered[name].value}) cannot be loaded: {exc!r}", "reinstall its package"
        ) from exc
    return factory
