"""Continuous batching: admit requests to rows, prefill prompts, decode.

Synchronous: no threads, no event loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
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
"""Largest number of prompt tokens in one step, so that a long prompt does not delay the decoding of
others."""

LOOK_AHEAD = 64
"""Number of waiting requests that one step considers for admission."""

GREEDY_BELOW = 1e-5
"""Lower temperatures count as 0, because their scaled logits would overflow."""

ADMIT_SHARE = 16
ADMIT_AFTER_STEPS = 4
"""Requests are admitted in batches of a sixteenth of the running ones, or after this many steps:
prefilling four prompts in one pass costs little more than one, and a request waits only a few
milliseconds."""


class NonFiniteError(Exception):
    """The model's logits are not finite: its weights are broken."""


class Core:
    """The synchronous engine: `add` requests, `step` until they are finished.

    Args:
        runner: runs the model.
        cache: holds the rows of requests.
        eos_ids: the model's end tokens.
        max_running: largest number of requests with a row.
        version: name of the weights at the start.
        seed: start of the seeds of requests without one.
        prefill_chunk: largest number of prompt tokens in one step.
        never_sampled: tokens that no request samples.

    Attributes:
        version: of the weights that sample the next token.
        stats: counters; `snapshot` updates the rest.
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
        never_sampled: Sequence[int] = (),
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
        self._never_sampled = tuple(never_sampled)
        self._unseeded = 0

        self._waiting: deque[Running] = deque()
        self._running: dict[int, Running] = {}  # by id of the row, in the order of admission
        self._prefilling: list[Running] = []  # running, but the prompt is not in the cache yet
        self._deferred_steps = 0
        self._batch: Batch | None = None

    @property
    def busy(self) -> bool:
        """Whether a step has work."""
        return bool(self._waiting or self._running)

    def add(self, generation: Generation, images: ImagePrompt | None = None) -> Running:
        """Queue a request; `images` are those of its prompt."""
        sampling = generation.sampling
        seed = sampling.sampling_seed
        if seed is None:
            # Large odd multiples keep the streams of unseeded requests apart from the small seeds
            # that users choose.
            self._unseeded += 1
            seed = stream_of(self._seed) ^ (0x9E3779B97F4A7C15 * self._unseeded)

        temperature = sampling.temperature if sampling.temperature >= GREEDY_BELOW else 0.0
        ends = frozenset(sampling.stop_token_ids or ()) | self._eos_ids

        running = Running(
            generation,
            ids=list(images.lookup_ids if images else generation.input_ids),
            limit=len(generation.input_ids) + sampling.max_new_tokens,
            stops=frozenset() if sampling.ignore_eos else ends,  # as SGLang: both kinds at once
            sampling=RowSampling(
                temperature,
                sampling.top_p,
                sampling.top_k,
                stream_of(seed),
                min_p=sampling.min_p,
                penalties=Penalties.of(sampling, ends),
            ),
            version=self.version,
            images=images,
        )

        self._waiting.append(running)
        self.stats.prompt_tokens += running.prompt_length
        return running

    def step(self) -> list[Running]:
        """Admit, prefill, and decode one token for each request whose prompt is in the cache.

        Returns:
            The requests that finished.

        Raises:
            NonFiniteError: the weights are broken. Call `drop_all` before the next step.
        """
        with torch.inference_mode():
            self._admit()
            self._prefill()
            finished = self._decode()
        self.stats.steps += 1
        return finished

    def abort(self, running: Running, message: str) -> None:
        """Finish a request with the tokens it has."""
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
        """All unfinished requests, running ones first."""
        yield from list(self._running.values())
        yield from list(self._waiting)

    def retract_all(self) -> None:
        """Move all running requests, without their rows, to the head of the queue."""
        # In reverse: each one goes to the head, so the queue keeps the order of admission.
        for running in reversed(list(self._running.values())):
            self._retract(running, keep=False)

    def flush(self) -> None:
        """Drop shared prefixes."""
        self.cache.flush()
        self._batch = None

    def weights_changed(self, version: str, mode: PauseMode) -> None:
        """Continue with the model's new parameters, named `version`.

        Unless `mode` is `in_place`, the cache of running requests is recomputed under them.
        """
        if mode != "in_place":
            self.retract_all()

        # Prefixes that old weights computed are not shared: finished requests' are dropped, running
        # ones' marked.
        self.cache.forget()
        self._batch = None
        self.cache.make_stale()

        self.runner.weights_changed()
        self.rename(version)

    def rename(self, version: str) -> None:
        """Name the weights that sample the next tokens `version`."""
        self.version = version
        for running in self.requests():
            running.set_version(version)

    def drop_all(self) -> list[Running]:
        """Drop all requests and the whole cache; return the unfinished requests."""
        dropped = list(self.requests())
        for running in self._running.values():
            running.row = None
        self._running.clear()
        self._prefilling.clear()
        self._waiting.clear()
        self._batch = None
        self.cache.reset()
        return dropped

    def snapshot(self) -> EngineStats:
        """Return the statistics, with the current numbers of requests and tokens."""
        self.stats.running = len(self._running)
        self.stats.waiting = len(self._waiting)
        self.stats.kv_tokens = self.cache.tokens
        return self.stats

    # The three parts of a step

    def _defers_admission(self) -> bool:
        """Whether to wait for more requests that can be prefilled together."""
        able = min(len(self._waiting), self._max_running - len(self._running))
        if able * ADMIT_SHARE >= len(self._running) or self._deferred_steps >= ADMIT_AFTER_STEPS:
            self._deferred_steps = 0
            return False
        self._deferred_steps += able > 0
        return True

    def _admit(self) -> None:
        """Give rows to waiting requests, in the order of the queue.

        The order inside the loop matters: look a prefix up before anything is placed (placing may
        evict it), wait for a prefix that is just being prefilled, place, and announce the new row
        last, once its request holds it.
        """
        if self._defers_admission():
            return

        # Prompt tokens that this step can still prefill.
        budget = self._prefill_chunk - sum(running.missing for running in self._prefilling)
        for running in list(islice(self._waiting, LOOK_AHEAD)):
            if budget <= 0 or len(self._running) >= self._max_running:
                return

            # 1. Find a row to share. An announced row may still lack tokens that it will share.
            match, shared = self.cache.lookup(running.ids)
            if match is not None and match.filled < shared:
                first = self._running.get(id(match))
                if first is not None and first.missing:
                    # The first sample of its group is being prefilled: skip this one until its
                    # prompt can be copied. Requests behind it may be admitted before it.
                    continue
                shared = match.filled

            # 2. Place it, by taking the shared row over or copying from it.
            row = self.cache.place(running.ids, len(running.ids), match, shared)
            if row is None and not self._running:
                # Only kept prefixes are in the way. Without them one request always fits: `KVCache`
                # has at least one row of the full context.
                self.cache.flush()
                row = self.cache.place(running.ids, len(running.ids), None, 0)
                assert row is not None
            if row is None:
                # No room until others finish. Smaller requests behind it do not overtake it, or it
                # would starve.
                return

            # 3. From here on it runs; the decode batch has to be rebuilt, because rows may have
            # moved.
            self._waiting.remove(running)
            self._running[id(row)] = running
            running.row = row
            self._batch = None
            if running.cached_tokens is None:  # the first admission, not one after a preemption
                running.cached_tokens = row.filled
                self.stats.cached_tokens += row.filled

            # 4. Announce the prompt before it is prefilled, so that the other samples of the group
            # wait for it (1).
            budget -= running.missing
            if running.missing:
                self._prefilling.append(running)
                self.cache.announce(row, len(running.ids) - 1)

    def _prefill(self) -> None:
        """Put at most `prefill_chunk` prompt tokens into the cache, oldest requests first."""
        if not self._prefilling:
            return

        budget = self._prefill_chunk
        chunks: list[Chunk] = []
        for running in self._prefilling:
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
        self._prefilling = [running for running in self._prefilling if running.missing]
        self._batch = None

    def _decode(self) -> list[Running]:
        """Sample one token per request whose prompt is in the cache; return the finished ones."""
        if self._batch is None or self._batch.worn_out:
            self._make_room()
            self.cache.compact()
            self._batch = Batch(self.cache, self._running, self._device, self._never_sampled)
        batch = self._batch
        if not batch.ready:
            return []

        logits = self.runner.decode(batch.tokens, batch.decoding)
        tokens, logprobs = batch.sampler.draw(logits, batch.positions)
        finished = self._record(batch, tokens.tolist(), logprobs.tolist())
        batch.advance(tokens)
        return finished

    def _record(self, batch: Batch, tokens: list[int], logprobs: list[float]) -> list[Running]:
        """Append each row's token to its request; return the finished requests."""
        finished: list[Running] = []
        self.stats.sampled_tokens += batch.ready
        for place, (running, token, logprob) in enumerate(zip(batch.entries, tokens, logprobs, strict=True)):
            if running is None:
                continue
            if not logprob <= 1e-3:
                raise NonFiniteError("the model's logits are not finite: its weights are broken, publish others")

            running.ids.append(token)
            running.logprobs.append(logprob)
            running.row.filled += 1  # type: ignore[union-attr]  # a request in the batch has a row
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
        """Release a request's row; with `keep` its tokens stay shareable."""
        row = running.row
        assert row is not None
        if running.missing:
            self._prefilling.remove(running)
        del self._running[id(row)]
        running.row = None
        self.cache.release(row, keep=keep)

    def _retract(self, running: Running, *, keep: bool) -> None:
        """Put a running request back at the head of the queue."""
        self._leave(running, keep=keep)
        self._batch = None
        self._waiting.appendleft(running)

    def _make_room(self) -> None:
        """Move full rows to larger pools; if there is no room, preempt the latest requests."""
        for running in list(self._running.values()):
            row = running.row
            if row is None or row.filled < row.pool.capacity or running.missing:
                continue
            while running.row is not None and not self.cache.grow(row, len(running.ids)):
                self._retract(next(reversed(self._running.values())), keep=True)
                self.stats.preempted += 1
