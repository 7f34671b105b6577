"""Continuous batching: who has a row, whose prompt is filled next, who decodes. No threads, no event loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice

import torch

from rollout_server.engines.base import EngineStats, Generation, PauseMode
from rollout_server.engines.torch_engine.batch import Batch
from rollout_server.engines.torch_engine.cache.kv import KVCache
from rollout_server.engines.torch_engine.model.attention import Chunk, PrefillPass
from rollout_server.engines.torch_engine.model.images import ImagePrompt
from rollout_server.engines.torch_engine.model.models import Runner
from rollout_server.engines.torch_engine.running import Running
from rollout_server.engines.torch_engine.sampling.penalties import Penalties
from rollout_server.engines.torch_engine.sampling.sampling import RowSampling, stream_of

PREFILL_CHUNK = 1024
"""Prompt tokens of one step at most, so that a long prompt does not hold up the others' decoding."""

LOOK_AHEAD = 64
"""Waiting requests looked at in one step."""

GREEDY_BELOW = 1e-5
"""Lower temperatures are taken as 0: their scaled logits would overflow."""

ADMIT_SHARE = 16
ADMIT_HELD_STEPS = 4
"""Requests are admitted a sixteenth of the running ones at a time, or after so many steps: filling four prompts in one
pass costs little more than filling one, and the others lose a few milliseconds."""


class NonFiniteError(Exception):
    """The model's logits are not finite: its weights are broken."""


class Core:
    """The synchronous engine: `add` requests, `step` until they are finished.

    Args:
        runner: runs the model.
        cache: its rows.
        eos_ids: the model's own end tokens.
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
        self._filling: list[Running] = []  # those of them whose prompt is not in the cache yet
        self._held_steps = 0
        self._batch: Batch | None = None

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, generation: Generation, images: ImagePrompt | None = None) -> Running:
        """Queue a request, with the images of its prompt."""
        sampling = generation.sampling
        seed = sampling.sampling_seed
        if seed is None:
            # Odd multiples keep the streams of unseeded requests apart from small seeds that users choose.
            self._unseeded += 1
            seed = stream_of(self._seed) ^ (0x9E3779B97F4A7C15 * self._unseeded)
        temperature = sampling.temperature if sampling.temperature >= GREEDY_BELOW else 0.0
        stops = frozenset(sampling.stop_token_ids or ())
        ends = stops | self._eos_ids
        running = Running(
            generation,
            ids=list(images.lookup_ids if images else generation.input_ids),
            limit=len(generation.input_ids) + sampling.max_new_tokens,
            stops=stops if sampling.ignore_eos else ends,
            sampling=RowSampling(
                temperature,
                sampling.top_p,
                sampling.top_k,
                stream_of(seed),
                min_p=sampling.min_p,
                edits=Penalties.of(sampling, ends),
            ),
            version=self.version,
            images=images,
        )
        self._waiting.append(running)
        self.stats.prompt_tokens += running.prompt_length
        return running

    def step(self) -> list[Running]:
        """Admit, fill, decode one token for each running request; returns the finished ones.

        Raises:
            NonFiniteError: the weights are broken. `drop_all`, then go on.
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
            self._batch = None
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
        self.cache.forget()
        self._batch = None
        self.cache.make_stale()
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
        self._filling.clear()
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

    def _holds_admission(self) -> bool:
        able = min(len(self._waiting), self._max_running - len(self._running))
        if able * ADMIT_SHARE >= len(self._running) or self._held_steps >= ADMIT_HELD_STEPS:
            self._held_steps = 0
            return False
        self._held_steps += able > 0
        return True

    def _admit(self) -> None:
        if self._holds_admission():
            return
        budget = self._prefill_chunk - sum(running.missing for running in self._filling)
        for running in list(islice(self._waiting, LOOK_AHEAD)):
            if budget <= 0 or len(self._running) >= self._max_running:
                return
            match, shared = self.cache.lookup(running.ids)
            if match is not None and match.filled < shared:
                first = self._running.get(id(match))
                if first is not None and first.missing:
                    continue  # its group's first sample is being filled right now: wait, then copy
                shared = match.filled
            row = self.cache.place(running.ids, len(running.ids), match, shared)
            if row is None and not self._running:
                # Kept prefixes are in the way of the only request: it fits alone, the budget sees to that.
                self.cache.flush()
                row = self.cache.place(running.ids, len(running.ids), None, 0)
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
                self._filling.append(running)
                self.cache.announce(row, len(running.ids) - 1)

    def _prefill(self) -> None:
        if not self._filling:
            return
        budget = self._prefill_chunk
        chunks: list[Chunk] = []
        for running in self._filling:
            count = min(running.missing, budget)
            assert running.row is not None
            chunks.append(Chunk(running.row, running.row.filled, running.row.filled + count, running.images))
            budget -= count
            if not budget:
                break
        self.runner.prefill(PrefillPass(chunks))
        for chunk in chunks:
            chunk.row.filled = chunk.end
            self.stats.prefilled_tokens += chunk.end - chunk.start
        self._filling = [running for running in self._filling if running.missing]
        self._batch = None

    def _decode(self) -> list[Running]:
        if self._batch is None or self._batch.worn_out:
            self._make_room()
            self.cache.compact()
            self._batch = Batch(self.cache, self._running, self._device)
        batch = self._batch
        if not batch.ready:
            return []
        logits = self.runner.decode(batch.tokens, batch.decoding)
        tokens, logprobs = batch.sampler.draw(logits, batch.positions)
        finished = self._record(batch, tokens.tolist(), logprobs.tolist())
        batch.advance(tokens)
        return finished

    def _record(self, batch: Batch, tokens: list[int], logprobs: list[float]) -> list[Running]:
        finished: list[Running] = []
        self.stats.sampled_tokens += batch.ready
        for place, (running, token, logprob) in enumerate(zip(batch.entries, tokens, logprobs, strict=True)):
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
            batch.entries[place] = None
            batch.ready -= 1
            self._leave(running)
        self.stats.finished += len(finished)
        return finished

    # Rows

    def _leave(self, running: Running, *, keep: bool = True) -> None:
        row = running.row
        assert row is not None
        if running.missing:
            self._filling.remove(running)
        del self._running[id(row)]
        running.row = None
        self.cache.release(row, keep=keep)

    def _retract(self, running: Running, *, keep: bool) -> None:
        self._leave(running, keep=keep)
        self._batch = None
        self._waiting.appendleft(running)

    def _make_room(self) -> None:
        """Give rows that are full a larger place; the last admitted requests make way when there is none."""
        for running in list(self._running.values()):
            row = running.row
            if row is None or row.filled < row.pool.capacity or running.missing:
                continue
            while running.row is not None and not self.cache.grow(row, len(running.ids)):
                self._retract(next(reversed(self._running.values())), keep=True)
                self.stats.preempted += 1
