"""Continuous batching: which requests have rows, whose prompt is filled next, who decodes. No threads, no event loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch

from agentloop.wire import VersionSpan
from rollout_server.engines.base import EngineStats, FinishType, Generation, GenerationResult, PauseMode
from rollout_server.engines.torch_engine.attention import Chunk, DecodePass, PrefillPass
from rollout_server.engines.torch_engine.kv import KVCache, Row
from rollout_server.engines.torch_engine.models import Runner
from rollout_server.engines.torch_engine.sampling import RowSampling, Sampler, stream_of

PREFILL_CHUNK = 1024
"""Prompt tokens of one step at most, so that a long prompt does not hold up the others' decoding."""

ROOM = int(__import__("os").environ.get("ROOM","16"))
LOOK_AHEAD = 64
"""Waiting requests looked at in one step."""

_IDLE = RowSampling(temperature=1.0, top_p=1.0, top_k=-1, stream=0)


class NonFiniteError(Exception):
    """The model's logits are not finite: its weights are broken."""


@dataclass(slots=True, eq=False)
class Running:
    """A request and what it has produced. `ids` is the prompt and then every sampled token."""

    generation: Generation
    ids: list[int]
    limit: int
    stops: frozenset[int]
    sampling: RowSampling
    version: str
    row: Row | None = None
    logprobs: list[float] = field(default_factory=list)
    version_starts: list[tuple[str, int]] = field(default_factory=list)
    cached_tokens: int | None = None
    result: GenerationResult | None = None

    @property
    def prompt_length(self) -> int:
        return len(self.generation.input_ids)

    @property
    def sampled(self) -> int:
        return len(self.ids) - len(self.generation.input_ids)

    @property
    def missing(self) -> int:
        """Tokens to put into the cache before the last one can be decoded."""
        return len(self.ids) - 1 - (self.row.filled if self.row else 0)

    def now_under(self, version: str) -> None:
        """From the next token on, `version` samples."""
        self.version_starts.append((self.version, len(self.logprobs)))
        self.version = version

    def spans(self) -> list[VersionSpan]:
        spans, start = [], 0
        for version, end in [*self.version_starts, (self.version, len(self.logprobs))]:
            if end > start:
                spans.append(VersionSpan(version=version, start=start, end=end))
            start = end
        return spans

    def finish(self, finish: FinishType, matched: int | None = None, message: str | None = None) -> None:
        self.result = GenerationResult(
            output_ids=self.ids[self.prompt_length :],
            logprobs=self.logprobs,
            spans=self.spans(),
            finish=finish,
            matched=matched,
            cached_tokens=self.cached_tokens or 0,
            weight_version=self.version,
            message=message,
        )


class _Batch:
    """The decode batch: one entry for each active row of the cache, None for holes and rows still being filled."""

    def __init__(self, cache: KVCache, running: dict[int, Running], device: torch.device) -> None:
        rows = [row for pool in cache.pools for row in pool.rows[: pool.active]]
        self.entries = [_ready(row, running) for row in rows]
        ready = [entry is not None for entry in self.entries]
        self.ready = sum(ready)
        if not self.ready:
            return
        self.tokens = torch.tensor([e.ids[-1] if e else 0 for e in self.entries], device=device)
        self.counters = np.array([e.sampled if e else 0 for e in self.entries], dtype=np.uint64)
        self.sampler = Sampler([e.sampling if e else _IDLE for e in self.entries], device)
        self.decoding = DecodePass(cache, [row.filled if row else 0 for row in rows], ready, device)
        self.steps_left = min(e.row.pool.capacity - e.row.filled for e in self.entries if e and e.row)

    def advance(self, tokens: torch.Tensor) -> None:
        self.tokens = tokens
        self.counters += np.uint64(1)
        self.steps_left -= 1
        self.decoding.advance()


def _ready(row: Row | None, running: dict[int, Running]) -> Running | None:
    entry = running.get(id(row)) if row is not None and row.in_use else None
    return entry if entry is not None and entry.missing == 0 else None


class Core:
    """The synchronous engine: `add` requests, `step` until they are finished.

    Args:
        runner: runs the model.
        cache: its rows.
        vocab_stops: the model's own end tokens.
        max_running: requests with a row at most.
        version: what the weights are called.
        seed: of requests that bring none.
    """

    def __init__(
        self,
        runner: Runner,
        cache: KVCache,
        *,
        eos_ids: frozenset[int],
        max_running: int,
        device: torch.device,
        version: str = "0",
        seed: int = 0,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        self.runner = runner
        self.cache = cache
        self.version = version
        self.stats = EngineStats(kv_tokens_max=cache.budget_tokens)
        self._eos_ids = eos_ids
        self._max_running = max_running
        self._device = device
        self._seed = seed
        self._prefill_chunk = prefill_chunk
        self._unseeded = 0
        self._waiting: deque[Running] = deque()
        self._running: dict[int, Running] = {}  # by id of the row, in the order of admission
        self._batch: _Batch | None = None

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, generation: Generation) -> Running:
        """Queue a request."""
        sampling = generation.sampling
        seed = sampling.sampling_seed
        if seed is None:
            # Odd multiples keep the streams of unseeded requests apart from small seeds that users choose.
            self._unseeded += 1
            seed = stream_of(self._seed) ^ (0x9E3779B97F4A7C15 * self._unseeded)
        stops = frozenset(sampling.stop_token_ids or ())
        running = Running(
            generation,
            ids=list(generation.input_ids),
            limit=len(generation.input_ids) + sampling.max_new_tokens,
            stops=stops if sampling.ignore_eos else stops | self._eos_ids,
            sampling=RowSampling(sampling.temperature, sampling.top_p, sampling.top_k, stream_of(seed)),
            version=self.version,
        )
        self._waiting.append(running)
        self.stats.prompt_tokens += running.prompt_length
        return running

    def step(self) -> list[Running]:
        """Admit, fill, decode one token for each running request; returns the finished ones.

        Raises:
            NonFiniteError: the weights are broken. The state is consistent: `fail_all` and go on.
        """
        with torch.inference_mode():
            self._admit()
            self._prefill()
            finished = self._decode()
        self.stats.steps += 1
        return finished

    def abort(self, running: Running, message: str) -> None:
        """End a request with what it has."""
        if running.result is not None:
            return
        if running.row is not None:
            self._leave(running)
        else:
            self._waiting.remove(running)
        running.finish("abort", message=message)
        self.stats.aborted += 1

    def requests(self) -> Iterator[Running]:
        """All that are not finished, running ones first."""
        yield from list(self._running.values())
        yield from list(self._waiting)

    def retract_all(self) -> None:
        """Take the rows of all running requests; they go back to the head of the queue with what they sampled."""
        for running in reversed(list(self._running.values())):
            self._retract(running, keep=False)

    def flush(self) -> None:
        """Forget shared prefixes."""
        self.cache.flush()
        self._batch = None

    def weights_changed(self, version: str, mode: PauseMode) -> None:
        """The model has new parameters, called `version`. `retract` recomputes running requests' cache."""
        if mode != "in_place":
            self.retract_all()
        self.flush()
        self.runner.weights_changed()
        self.version = version
        for running in self.requests():
            running.now_under(version)

    def drop_all(self) -> list[Running]:
        """Forget all requests and everything cached; returns the requests, unfinished."""
        dropped = list(self.requests())
        for running in self._running.values():
            running.row = None
        self._running.clear()
        self._waiting.clear()
        self._batch = None
        self.cache.reset()
        return dropped

    def snapshot(self) -> EngineStats:
        """The statistics, with what is true right now."""
        self.stats.running = len(self._running)
        self.stats.waiting = len(self._waiting)
        self.stats.kv_tokens = self.cache.tokens
        return self.stats

    # One step's three parts

    def _admit(self) -> None:
        budget = self._prefill_chunk - sum(r.missing for r in self._running.values() if r.missing)
        for running in list(islice(self._waiting, LOOK_AHEAD)):
            if budget <= 0 or len(self._running) >= self._max_running:
                return
            match, shared = self.cache.lookup(running.ids)
            if match is not None and match.filled < shared:
                first = self._running.get(id(match))
                if first is not None and first.missing:
                    continue  # its group's first sample is being filled right now: wait, then copy
                shared = match.filled
            row = self.cache.place(running.ids, self._room(running), match, shared)
            if row is None and not self._running:
                # Kept prefixes are in the way of the only request: it fits alone, the budget sees to that.
                self.cache.evict_all()
                row = self.cache.place(running.ids, self._room(running), None, 0)
                assert row is not None
            if row is None:
                return
            self._waiting.remove(running)
            self._running[id(row)] = running
            running.row = row
            self._batch = None
            if running.cached_tokens is None:
                running.cached_tokens = row.filled
                self.stats.cached_tokens += row.filled
            budget -= running.missing
            if running.missing:
                self.cache.announce(row, len(running.ids) - 1)

    def _room(self, running: Running) -> int:
        """Tokens to make room for at first: not all that may be sampled, for most turns end early."""
        return min(running.limit, len(running.ids) + ROOM)

    def _prefill(self) -> None:
        budget = self._prefill_chunk
        chunks: list[Chunk] = []
        for running in self._running.values():
            if budget <= 0:
                break
            count = min(running.missing, budget)
            if count:
                assert running.row is not None
                chunks.append(Chunk(running.row, running.row.filled, running.row.filled + count))
                budget -= count
        if not chunks:
            return
        self.runner.prefill(PrefillPass(chunks))
        for chunk in chunks:
            chunk.row.filled = chunk.end
            self.stats.prefilled_tokens += chunk.end - chunk.start
        self._batch = None

    def _decode(self) -> list[Running]:
        if self._batch is None or self._batch.ready and not self._batch.steps_left:
            self._make_room()
            self.cache.compact()
            self._batch = _Batch(self.cache, self._running, self._device)
        batch = self._batch
        if not batch.ready:
            return []
        logits = self.runner.decode(batch.tokens, batch.decoding)
        tokens, logprobs = batch.sampler.draw(logits, batch.counters)
        finished = self._record(batch, tokens.tolist(), logprobs.tolist())
        if finished:
            self._batch = None
        else:
            batch.advance(tokens)
        return finished

    def _record(self, batch: _Batch, tokens: list[int], logprobs: list[float]) -> list[Running]:
        finished: list[Running] = []
        for running, token, logprob in zip(batch.entries, tokens, logprobs, strict=True):
            if running is None:
                continue
            if not logprob <= 1e-3:
                raise NonFiniteError("the model's logits are not finite: the weights are broken")
            running.ids.append(token)
            running.logprobs.append(logprob)
            running.row.filled += 1  # type: ignore[union-attr]
            if token in running.stops:
                running.finish("stop", matched=token)
            elif len(running.ids) >= running.limit:
                running.finish("length")
            else:
                continue
            finished.append(running)
        self.stats.sampled_tokens += batch.ready
        for running in finished:
            self._leave(running)
            self.stats.finished += 1
        return finished

    # Rows

    def _leave(self, running: Running, *, keep: bool = True) -> None:
        row = running.row
        assert row is not None
        del self._running[id(row)]
        running.row = None
        self.cache.release(row, keep=keep)
        self._batch = None

    def _retract(self, running: Running, *, keep: bool) -> None:
        self._leave(running, keep=keep)
        self._waiting.appendleft(running)

    def _make_room(self) -> None:
        """Give rows that are full a larger place; the last admitted requests make way when there is none."""
        for running in list(self._running.values()):
            row = running.row
            if row is None or row.filled < row.pool.capacity or running.missing:
                continue
            while running.row is not None and not self.cache.grow(row, self._room(running)):
                self._retract(next(reversed(self._running.values())), keep=True)
                self.stats.preempted += 1


def build_cache(loaded: Any, *, max_running: int, max_kv_tokens: int | None, memory_bytes: int) -> KVCache:
    """The KV cache of a model within a budget.

    Args:
        max_kv_tokens: the budget in tokens; None: twice what `max_running` usual sequences take, so that their
            prefixes stay when they are done, within a quarter of the memory.
        memory_bytes: memory of the device.
    """
    if max_kv_tokens is None:
        usual = min(loaded.context_length, 2048)
        fits = memory_bytes // 4 // loaded.kv.bytes_per_token
        max_kv_tokens = max(loaded.context_length, min(2 * max_running * usual, fits))
    return KVCache(loaded.kv, max_kv_tokens, loaded.context_length)
