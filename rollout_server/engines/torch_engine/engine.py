"""The engine's thread: takes requests from the event loop, returns results after each step."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from agentloop.wire import SamplingParams
from rollout_server.engines.base import (
    AnswerChunk,
    EngineInfo,
    EngineStats,
    Generation,
    GenerationResult,
    PauseMode,
    RunningMode,
    UpdateGroup,
    WeightsConfirmation,
    WeightsSource,
)
from rollout_server.engines.torch_engine.core import Core
from rollout_server.engines.torch_engine.model.images import ImagePrompt
from rollout_server.engines.torch_engine.model.models import LoadedModel
from rollout_server.engines.torch_engine.running import Running
from rollout_server.engines.torch_engine.weights.loader import WeightLoader
from rollout_server.errors import Conflict, EngineError, RequestError

log = logging.getLogger(__name__)

MAX_STEP_FAILURES = 3
"""Failed steps in a row after which the engine gives up."""

ResultT = TypeVar("ResultT")


@dataclass(slots=True, eq=False)
class _Reading:
    """A request whose images are still being read, before it is passed to the core."""

    rid: str
    aborted: bool = False


class TorchEngine:
    """The embedded engine, an `Engine`. One thread runs all steps; every change happens between two
    of them.

    Args:
        core: uses `loaded`; from now on, only the engine's thread may use it.
        loader: loads new versions into the model of `loaded`.
        threads: torch's threads for one operator.
        memory_saver: whether `memory` may release the KV cache.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        core: Core,
        info: EngineInfo,
        *,
        loader: WeightLoader,
        threads: int = 1,
        memory_saver: bool = False,
    ) -> None:
        self._loaded = loaded
        self._loader = loader
        self._core = core
        self._info = info
        self._threads = threads
        self._memory_saver = memory_saver

        # Both threads use these; single reads, writes and deque operations are atomic.
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._sleeping = False
        self._stopping = False
        self._failure: str | None = None
        self._ended: str | None = None
        self._paused: PauseMode | None = None
        self._released = False

        # The engine's thread.
        self._futures: dict[Running, asyncio.Future[GenerationResult]] = {}
        self._streaming: list[Running] = []
        self._failed_steps = 0

        # The event loop's thread.
        self._reading: set[_Reading] = set()
        self._updating = asyncio.Lock()

        self._thread = threading.Thread(target=self._run, name="torch engine", daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def model(self) -> Any:
        """The served transformers model; read only."""
        return self._loaded.model

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
        self._check_minimum(generation.sampling)
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

    async def memory(self, what: Literal["release", "resume"], tags: Sequence[str] | None) -> None:
        """Release the memory of the KV cache, or allow it again: it grows with the requests.

        The tag `weights` has no effect: weights are replaced where they are.
        """
        if not self._memory_saver:
            raise Conflict(f"the torch engine cannot {what} its memory: it was started without --memory-saver")
        if tags is None or "kv_cache" in tags:
            await self._between_steps(self._release if what == "release" else self._take_again)

    async def update_weights(
        self, source: WeightsSource, version: str, running: RunningMode = "retract"
    ) -> WeightsConfirmation:
        async with self._updating:
            begin = time.perf_counter()
            staged = await asyncio.to_thread(self._loader.stage, source, version)

            def swap_in() -> list[torch.Tensor]:
                before = self._loader.swap_in(staged)
                self._core.weights_changed(version, self._paused or running)
                return before

            before = await self._between_steps(swap_in)
            # Not awaited: freeing gigabytes takes long.
            asyncio.get_running_loop().run_in_executor(None, before.clear)
            self._core.stats.weight_updates += 1
            self._core.stats.weight_update_s += time.perf_counter() - begin

            return WeightsConfirmation(version, staged.checksum)

    async def rename_weights(self, version: str) -> None:
        async with self._updating:
            await self._between_steps(lambda: self._core.rename(version))

    async def join_weights_group(self, group: UpdateGroup) -> None:
        async with self._updating:
            await asyncio.to_thread(self._loader.groups.join, group, self._loaded.kv.device)

    async def leave_weights_group(self, name: str) -> bool:
        async with self._updating:
            return await asyncio.to_thread(self._loader.groups.leave, name)

    async def close(self) -> None:
        self._stopping = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join, 10)
        await asyncio.to_thread(self._loader.groups.close)
        if self._loaded.images is not None:
            self._loaded.images.close()

    # Called on the event loop's thread

    def _check_minimum(self, sampling: SamplingParams) -> None:
        """Refuse a `min_new_tokens` that no token could meet."""
        stops, vocab_size = sampling.stop_token_ids or (), self._loaded.vocab_size
        if not sampling.min_new_tokens or len(stops) + len(self._loaded.eos_ids) < vocab_size:
            return
        ends = {*stops, *(token for token in self._loaded.eos_ids if 0 <= token < vocab_size)}
        if len(ends) >= vocab_size:
            raise RequestError(
                "min_new_tokens cannot be met: every token of the vocabulary is an end token of the model or one of "
                "stop_token_ids. Leave one of the two out",
                "sampling_params.min_new_tokens",
            )

    async def _read(self, generation: Generation, reading: _Reading) -> ImagePrompt | None:
        """Decode a request's images on another thread.

        Raises:
            RequestError: the model takes no images, or one of these is wrong.
        """
        reader = self._loaded.images
        if reader is None:
            raise RequestError("this model takes no images: leave image_data out", "image_data")
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
        # Wake the thread only if it sleeps: while it works it reads the inbox after each step, and
        # setting the event would make both threads compete for the interpreter lock.
        if self._sleeping:
            self._wake.set()

    async def _between_steps(self, action: Callable[[], ResultT]) -> ResultT:
        """Run `action` on the engine's thread, between two steps, and return its result."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ResultT] = loop.create_future()

        def act() -> None:
            try:
                result = action()
            except Exception as exc:  # noqa: BLE001  # raised again in the caller
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

        # The order matters: from here on new requests are refused, and those already in the inbox
        # are answered.
        self._ended = self._failure or "the server is stopping"
        while self._inbox:
            self._inbox.popleft()()
        self._fail_all(EngineError(self._ended))

    def _loop(self) -> None:
        while not self._stopping:
            if self._stands_still or not self._core.busy:
                self._sleep()
            while self._inbox:
                self._inbox.popleft()()
            if not self._stands_still and self._core.busy and not self._stopping:
                self._step()

    @property
    def _stands_still(self) -> bool:
        return self._paused is not None or self._released

    def _release(self) -> None:
        if self._core.busy:
            raise Conflict("memory cannot be released while requests are in flight: let them end first")
        self._released = True
        self._core.drop_all()
        if self._loaded.kv.device.type == "cuda":
            torch.cuda.empty_cache()

    def _take_again(self) -> None:
        self._released = False

    def _sleep(self) -> None:
        """Wait until something is posted."""
        # The flag is set before the inbox is read: an action posted in between then sets the event.
        self._sleeping = True
        if not self._inbox and not self._stopping:
            self._wake.wait()
        self._sleeping = False
        self._wake.clear()

    def _step(self) -> None:
        try:
            finished = self._core.step()
        except Exception as exc:
            log.exception("an engine step failed; its requests fail and the cache is cleared")
            self._failed_steps += 1
            self._core.stats.step_failures += 1
            self._core.drop_all()
            self._fail_all(EngineError(f"the engine failed: {exc or type(exc).__name__}"))
            if self._failed_steps >= MAX_STEP_FAILURES:
                self._failure = f"{self._failed_steps} engine steps failed in a row, the last one with {exc!r}"
                self._stopping = True
        else:
            self._failed_steps = 0
            if self._streaming:
                self._send_chunks()
            if finished:
                self._deliver(finished)

    def _start(
        self, generation: Generation, images: ImagePrompt | None, future: asyncio.Future[GenerationResult]
    ) -> None:
        if not future.cancelled():
            running = self._core.add(generation, images)
            self._futures[running] = future
            if generation.on_chunk is not None:
                self._streaming.append(running)

    def _cancel(self, future: asyncio.Future[GenerationResult]) -> None:
        running = next((r for r, f in self._futures.items() if f is future), None)
        if running is not None:
            self._core.abort(running, "the client disconnected")
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

    def _send_chunks(self) -> None:
        """Stream the tokens since the last chunk, in a single call to the event loop."""
        self._streaming = [running for running in self._streaming if running in self._futures and not running.result]
        chunks = [(running, chunk) for running in self._streaming if (chunk := running.next_chunk()) is not None]
        if chunks:
            loop = self._futures[chunks[0][0]].get_loop()
            loop.call_soon_threadsafe(_call_all, [(r.generation.on_chunk, chunk) for r, chunk in chunks])

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


def _call_all(chunks: list[tuple[Any, AnswerChunk]]) -> None:
    for on_chunk, chunk in chunks:
        on_chunk(chunk)


def _resolve(future: asyncio.Future[Any], result: Any) -> None:
    if not future.done():
        future.set_result(result)


def _resolve_all(pairs: list[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, result in pairs:
        _resolve(future, result)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
