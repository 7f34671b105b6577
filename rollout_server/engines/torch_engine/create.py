"""Create an engine from a server's settings: the model, its runner, its cache, its thread."""

from __future__ import annotations

import logging

import psutil
import torch

from agentloop.config.server import ServerSettings
from agentloop.errors import ModelError
from rollout_server.engines.base import EngineInfo, FolderWeights
from rollout_server.engines.torch_engine.cache.kv import build_cache
from rollout_server.engines.torch_engine.core import Core
from rollout_server.engines.torch_engine.engine import TorchEngine
from rollout_server.engines.torch_engine.model.batch_invariance import is_batch_invariant
from rollout_server.engines.torch_engine.model.fast_decoder import FastDecoder
from rollout_server.engines.torch_engine.model.models import LoadedModel, Runner, load_model, slow_runner
from rollout_server.engines.torch_engine.weights.loader import WeightLoader
from rollout_server.errors import WeightsError

log = logging.getLogger(__name__)


def create_torch_engine(settings: ServerSettings) -> TorchEngine:
    """Load the model and start the engine's thread.

    Raises:
        ModelError: the model, or the weights to start from, cannot be served.
    """
    torch.set_num_threads(settings.threads)
    device = torch.device(f"cuda:{settings.first_gpu}" if settings.device == "cuda" else settings.device)
    loaded = load_model(
        settings.model,
        dtype=getattr(torch, settings.dtype),
        device=device,
        context_length=settings.context_length,
        trust_remote_code=settings.trust_remote_code,
    )

    # Before a runner is built: it rearranges the weights, and checks its results on them.
    loader = WeightLoader(loaded.model)
    if settings.weights is not None:
        try:
            loader.swap_in(loader.stage(FolderWeights(settings.weights)))
        except WeightsError as exc:
            raise ModelError(
                str(exc), "point --weights at a folder that the trainer of this model has published"
            ) from exc

    runner = _runner(settings, loaded)
    log.info("%s runs through %s", type(loaded.model).__name__, type(runner).__name__)

    memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    core = Core(
        runner,
        build_cache(
            loaded.kv,
            loaded.context_length,
            max_running=settings.max_running,
            max_kv_tokens=settings.max_kv_tokens,
            memory_bytes=memory,
        ),
        eos_ids=loaded.eos_ids,
        max_running=settings.max_running,
        device=device,
        version=settings.weight_version,
        seed=settings.seed,
        never_sampled=loaded.placeholders.never_sampled if loaded.placeholders else (),
    )
    info = EngineInfo(
        "torch",
        settings.model,
        loaded.context_length,
        loaded.vocab_size,
        images=loaded.images is not None,
        placeholders=loaded.placeholders,
    )
    return TorchEngine(loaded, core, info, loader=loader, threads=settings.threads, memory_saver=settings.memory_saver)


def _runner(settings: ServerSettings, loaded: LoadedModel) -> Runner:
    """Return the fastest runner that the settings and the model allow."""
    runner = _deterministic_runner(settings, loaded) if settings.deterministic != "off" else None
    if runner is None and settings.fast_path:
        runner = FastDecoder.build(loaded)
    return slow_runner(loaded) if runner is None else runner


def _deterministic_runner(settings: ServerSettings, loaded: LoadedModel) -> Runner | None:
    """Return a runner whose results depend on the tokens alone; None: `auto`, and there is none.

    Raises:
        ModelError: there is none and the setting is `on`.
    """
    if settings.device != "cpu" or settings.threads != 1:
        reason = f"it needs --device cpu and --threads 1, not {settings.device} and {settings.threads}"
    elif (runner := FastDecoder.build(loaded, invariant=True)) is None:
        reason = f"{type(loaded.model).__name__} in {settings.dtype} does not run through the engine's own decoder"
    elif not is_batch_invariant(runner, loaded):
        reason = "on this machine, the results of matmul kernels depend on the other rows of a batch"
    else:
        return runner

    if settings.deterministic == "on":
        raise ModelError(f"--deterministic on is not possible: {reason}", "use --deterministic auto or off")
    log.warning("results depend in their last bits on the other requests in a batch: %s", reason)
    return None
