"""The engine's thread: requests come in from the event loop, results go back to it once per step."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import torch

from agentloop.config.server import ServerSettings
from agentloop.errors import ModelError
from rollout_server.engines.base import (
    AnswerChunk,
    EngineInfo,
    EngineStats,
    FolderWeights,
    Generation,
    GenerationResult,
    PauseMode,
    RunningMode,
    UpdateGroup,
    WeightsConfirmation,
    WeightsSource,
)
from rollout_server.engines.torch_engine.cache.kv import build_cache
from rollout_server.engines.torch_engine.core import Core
from rollout_server.engines.torch_engine.model.batch_invariance import is_batch_invariant
from rollout_server.engines.torch_engine.model.fast_decoder import FastDecoder
from rollout_server.engines.torch_engine.model.images import ImagePrompt
from rollout_server.engines.torch_engine.model.models import LoadedModel, Runner, load_model, slow_runner
from rollout_server.engines.torch_engine.running import Running
from rollout_server.engines.torch_engine.weights.loading import WeightLoader
from rollout_server.errors import EngineError, RequestError, WeightsError

log = logging.getLogger(__name__)

MAX_STEP_FAILURES = 3
"""So many failing steps with no good one between them, and the engine gives up."""

ResultT = TypeVar("ResultT")


@dataclass(slots=True, eq=False)
class _Reading:
    """A request whose images are being read: the core does not know it yet."""

    rid: str
    aborted: bool = False


class TorchEngine:
    """The embedded engine, an `Engine`. One thread runs all steps; every change happens between two of them."""

    def __init__(
        self, loaded: LoadedModel, core: Core, info: EngineInfo, *, threads: int = 1, intake: WeightLoader | None = None
    ) -> None:
        self._loaded = loaded
        self._intake = intake or WeightLoader(loaded.model)
        self._core = core
        self._info = info
        self._threads = threads
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._sleeping = False
        self._futures: dict[Running, asyncio.Future[GenerationResult]] = {}
        self._listened: list[Running] = []
        self._reading: set[_Reading] = set()
        self._paused: PauseMode | None = None
        self._stopping = False
        self._failure: str | None = None
        self._ended: str | None = None
        self._failed_steps = 0
        self._updating = asyncio.Lock()
        self._thread = threading.Thread(target=self._run, name="torch engine", daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def weight_version(self) -> str:
        return self._core.version

    @property
    def failure(self) -> str | None:
        return self._failure

    def stats(self) -> EngineStats:
        stats = self._core.snapshot()
        stats.paused = self._paused is not None
        return stats

    async def generate(self, generation: Generation) -> GenerationResult:
        images = None
        if generation.image_data or self._loaded.images is not None:
            reading = _Reading(generation.rid)
            images = await self._read(generation, reading)
            if reading.aborted:
                return GenerationResult([], [], [], "abort", None, 0, self.weight_version, "aborted on request")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[GenerationResult] = loop.create_future()
        self._post(lambda: self._start(generation, images, future))
        try:
            return await future
        except asyncio.CancelledError:
            self._post(lambda: self._cancel(future))
            raise

    async def abort(self, rid: str | None) -> int:
        return self._abort_reading(rid) + await self._between_steps(lambda: self._abort(rid))

    async def pause(self, mode: PauseMode) -> None:
        if mode == "abort":
            self._abort_reading(None)
        await self._between_steps(lambda: self._pause(mode))

    async def resume(self) -> None:
        def resume() -> None:
            self._paused = None

        await self._between_steps(resume)

    async def flush_cache(self) -> None:
        await self._between_steps(self._core.flush)

    async def update_weights(
        self, source: WeightsSource, version: str, running: RunningMode = "retract"
    ) -> WeightsConfirmation:
        async with self._updating:
            begin = time.perf_counter()
            taken = await asyncio.to_thread(self._intake.take, source, version)

            def apply() -> list[torch.Tensor]:
                before = self._intake.put(taken)
                self._core.weights_changed(version, self._paused or running)
                return before

            before = await self._between_steps(apply)
            # Nobody waits for it: giving gigabytes back takes long.
            asyncio.get_running_loop().run_in_executor(None, before.clear)
            self._core.stats.weight_updates += 1
            self._core.stats.weight_update_s += time.perf_counter() - begin
            return WeightsConfirmation(version, taken.checksum)

    async def join_weights_group(self, group: UpdateGroup) -> None:
        async with self._updating:
            await asyncio.to_thread(self._intake.groups.join, group, self._loaded.kv.device)

    async def leave_weights_group(self, name: str) -> bool:
        async with self._updating:
            return await asyncio.to_thread(self._intake.groups.leave, name)

    async def close(self) -> None:
        self._stopping = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join, 10)
        await asyncio.to_thread(self._intake.groups.close)
        if self._loaded.images is not None:
            self._loaded.images.close()

    # Called on the event loop's thread

    async def _read(self, generation: Generation, reading: _Reading) -> ImagePrompt | None:
        """The images of a request, ready for the core.

        Raises:
            RequestError: they cannot be taken.
        """
        reader = self._loaded.images
        if reader is None:
            raise RequestError("this engine serves a model without images", "image_data")
        if self._ended or self._stopping:
            raise EngineError(self._ended or "the server is stopping")
        self._reading.add(reading)
        try:
            return await reader.prepare(generation.input_ids, generation.image_data)
        finally:
            self._reading.remove(reading)

    def _abort_reading(self, rid: str | None) -> int:
        aborted = [reading for reading in self._reading if not reading.aborted and rid in (None, reading.rid)]
        for reading in aborted:
            reading.aborted = True
        self._core.stats.aborted += len(aborted)
        return len(aborted)

    def _post(self, action: Callable[[], None]) -> None:
        if self._ended:
            raise EngineError(self._ended)
        self._inbox.append(action)
        # Only a sleeping thread is woken: one that works looks into the inbox after each step, and telling it would
        # cost a fight for the interpreter lock.
        if self._sleeping:
            self._wake.set()

    async def _between_steps(self, action: Callable[[], ResultT]) -> ResultT:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ResultT] = loop.create_future()

        def act() -> None:
            try:
                result = action()
            except Exception as exc:  # noqa: BLE001  # handed to the caller, who awaits it
                loop.call_soon_threadsafe(_fail, future, exc)
            else:
                loop.call_soon_threadsafe(_resolve, future, result)

        self._post(act)
        return await future

    # Called on the engine's thread

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            self._loop()
        except Exception as exc:
            log.exception("the engine's thread failed")
            self._failure = f"the engine's thread failed with {exc!r}"
        # In this order: what is posted from now on is refused, what was posted before is answered.
        self._ended = self._failure or "the server is stopping"
        while self._inbox:
            self._inbox.popleft()()
        self._fail_all(EngineError(self._ended))

    def _loop(self) -> None:
        while not self._stopping:
            if self._paused is not None or not self._core.busy:
                self._sleep()
            while self._inbox:
                self._inbox.popleft()()
            if self._paused is None and self._core.busy and not self._stopping:
                self._step()

    def _sleep(self) -> None:
        """Until something is posted. The flag goes up before the inbox is looked at, so that nothing slips between."""
        self._sleeping = True
        if not self._inbox and not self._stopping:
            self._wake.wait()
        self._sleeping = False
        self._wake.clear()

    def _step(self) -> None:
        try:
            finished = self._core.step()
        except Exception as exc:
            log.exception("an engine step failed; its requests are failed, the cache is emptied")
            self._failed_steps += 1
            self._core.stats.step_failures += 1
            self._core.drop_all()
            self._fail_all(EngineError(f"the engine failed: {exc or type(exc).__name__}"))
            if self._failed_steps >= MAX_STEP_FAILURES:
                self._failure = f"{self._failed_steps} engine steps in a row failed, the last with {exc!r}"
                self._stopping = True
        else:
            self._failed_steps = 0
            if self._listened:
                self._tell()
            if finished:
                self._deliver(finished)

    def _start(
        self, generation: Generation, images: ImagePrompt | None, future: asyncio.Future[GenerationResult]
    ) -> None:
        if not future.cancelled():
            running = self._core.add(generation, images)
            self._futures[running] = future
            if generation.on_chunk is not None:
                self._listened.append(running)

    def _cancel(self, future: asyncio.Future[GenerationResult]) -> None:
        running = next((r for r, f in self._futures.items() if f is future), None)
        if running is not None:
            self._core.abort(running, "the client went away")
            del self._futures[running]

    def _abort(self, rid: str | None) -> int:
        aborted = [r for r in self._core.requests() if rid is None or r.generation.rid == rid]
        for running in aborted:
            self._core.abort(running, "aborted on request")
        self._deliver(aborted)
        return len(aborted)

    def _pause(self, mode: PauseMode) -> None:
        self._paused = mode
        if mode == "retract":
            self._core.retract_all()
        elif mode == "abort":
            self._abort(None)

    def _tell(self) -> None:
        """Hand out what was sampled of the answers that somebody follows."""
        self._listened = [running for running in self._listened if running in self._futures and not running.result]
        pieces = [(running, piece) for running in self._listened if (piece := running.next_piece()) is not None]
        if pieces:
            loop = self._futures[pieces[0][0]].get_loop()
            loop.call_soon_threadsafe(_hand_out, [(r.generation.on_chunk, piece) for r, piece in pieces])

    def _deliver(self, finished: list[Running]) -> None:
        pairs = [(self._futures.pop(running), running.result) for running in finished]
        if pairs:
            pairs[0][0].get_loop().call_soon_threadsafe(_resolve_all, pairs)

    def _fail_all(self, error: EngineError) -> None:
        futures = list(self._futures.values())
        self._futures.clear()
        for future in futures:
            self._core.stats.failed += 1
            future.get_loop().call_soon_threadsafe(_fail, future, error)


def _hand_out(pieces: list[tuple[Any, AnswerChunk]]) -> None:
    for listener, piece in pieces:
        listener(piece)


def _resolve(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _resolve_all(pairs: list[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, result in pairs:
        _resolve(future, result)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def create_torch_engine(settings: ServerSettings) -> TorchEngine:
    """Load the model and start the engine's thread.

    Raises:
        ModelError: the model or the weights to start from cannot be served.
    """
    torch.set_num_threads(settings.threads)
    device = torch.device(settings.device)
    loaded = load_model(
        settings.model, dtype=getattr(torch, settings.dtype), device=device, context_length=settings.context_length
    )
    intake = WeightLoader(loaded.model)
    if settings.weights is not None:
        try:
            intake.put(intake.take(FolderWeights(settings.weights)))
        except WeightsError as exc:
            raise ModelError(str(exc), "give --weights a folder that this model's trainer published") from exc
    runner = _deterministic_runner(settings, loaded) if settings.deterministic != "off" else None
    if runner is None and settings.fast_path:
        runner = FastDecoder.build(loaded)
    if runner is None:
        runner = slow_runner(loaded)
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
    )
    info = EngineInfo("torch", settings.model, loaded.context_length, loaded.vocab_size, loaded.images is not None)
    return TorchEngine(loaded, core, info, threads=settings.threads, intake=intake)


def _deterministic_runner(settings: ServerSettings, loaded: LoadedModel) -> Runner | None:
    """A runner whose results are functions of the tokens alone; None: there is none, and `auto` asked for it.

    Raises:
        ModelError: there is none, and `on` asked for it.
    """
    reason = None
    if settings.device != "cpu" or settings.threads != 1:
        reason = f"it needs --device cpu and --threads 1, not {settings.device} and {settings.threads}"
    elif (runner := FastDecoder.build(loaded, invariant=True)) is None:
        reason = f"{type(loaded.model).__name__} in {settings.dtype} does not run through the engine's own decoder"
    elif not is_batch_invariant(runner, loaded):
        reason = "the products of this machine's numerical library depend on their neighbours"
    else:
        return runner
    if settings.deterministic == "on":
        raise ModelError(f"--deterministic on: {reason}", "leave it out, or give auto")
    log.warning("results depend on what else is served, in their last bits: %s", reason)
    return None
