"""Failover: keep the tokens sampled by a dead replica, and let another replica continue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from agentloop.wire import VersionSpan
from rollout_server.engines.base import AnswerChunk, Generation, GenerationResult


class ChunkRelay:
    """Passes chunks to the caller's callback, and records whether there were any."""

    def __init__(self, on_chunk: Callable[[AnswerChunk], None]) -> None:
        self._on_chunk = on_chunk
        self.sent = False

    def __call__(self, chunk: AnswerChunk) -> None:
        self.sent = True
        self._on_chunk(chunk)


class PartialAnswer:
    """The part of an answer that was sampled by replicas that died.

    Sampling continues exactly where it stopped: the kept tokens become prompt, and the random
    numbers of a seeded request depend only on a token's position. Penalties look back at sampled
    tokens only, so requests with penalties start again; so do requests with images, because a kept
    token could be mistaken for one of an image.

    Args:
        generation: the caller's request; it is not changed.
        stream_tokens: tokens per chunk, which are lost at most when a replica dies.
    """

    def __init__(self, generation: Generation, stream_tokens: int) -> None:
        self._generation = generation
        self._stream_tokens = stream_tokens
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._spans: list[VersionSpan] = []
        self._base = 0  # tokens sampled by replicas that died

    @property
    def tokens(self) -> int:
        """Number of kept tokens."""
        return len(self._ids)

    def rest(self) -> Generation:
        """Return the request for the tokens still to be sampled, whose chunks are kept here."""
        self._base = len(self._ids)
        whole = self._generation
        sampling = whole.sampling
        if self._ids:
            sampling = sampling.model_copy(update={"max_new_tokens": sampling.max_new_tokens - self._base})

        every = self._stream_tokens
        if whole.on_chunk is not None:
            every = min(every, whole.stream_tokens)
        return replace(
            whole,
            input_ids=whole.input_ids + self._ids,
            sampling=sampling,
            on_chunk=self._keep,
            stream_tokens=every,
        )

    def whole(self, result: GenerationResult) -> GenerationResult:
        """Return the whole answer, given the result of the last `rest`."""
        base = self._base
        if base:
            result.output_ids = self._ids[:base] + result.output_ids
            result.logprobs = self._logprobs[:base] + result.logprobs
            result.spans = joined(self._spans_until(base), result.spans, base)
            result.cached_tokens = min(result.cached_tokens, len(self._generation.input_ids))
        return result

    def finished(self) -> GenerationResult | None:
        """Return the answer if it is complete: the replica died just before sending it."""
        if len(self._ids) < self._generation.sampling.max_new_tokens:
            return None
        spans = self._spans_until(len(self._ids))
        return GenerationResult(
            self._ids, self._logprobs, spans, "length", None, cached_tokens=0, weight_version=spans[-1].version
        )

    def _keep(self, chunk: AnswerChunk) -> None:
        self._ids += chunk.output_ids
        self._logprobs += chunk.logprobs
        self._spans = joined(self._spans_until(self._base), chunk.spans, self._base)
        if self._generation.on_chunk is not None:
            self._generation.on_chunk(replace(chunk, spans=self._spans))

    def _spans_until(self, end: int) -> list[VersionSpan]:
        return [s.model_copy(update={"end": min(s.end, end)}) for s in self._spans if s.start < end]


def joined(first: list[VersionSpan], second: list[VersionSpan], offset: int) -> list[VersionSpan]:
    """Join the spans of two parts of one answer; the second part starts at token `offset`."""
    spans = list(first)
    for span in second:
        moved = VersionSpan(version=span.version, start=span.start + offset, end=span.end + offset)
        if spans and spans[-1].version == moved.version and spans[-1].end == moved.start:
            spans[-1] = spans[-1].model_copy(update={"end": moved.end})
        else:
            spans.append(moved)
    return spans


def can_continue(generation: Generation) -> bool:
    """Return whether another replica can continue with the same distribution for each token."""
    sampling = generation.sampling
    looks_back = (
        sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.repetition_penalty != 1.0
        or sampling.min_new_tokens
    )
    return not looks_back and not generation.image_data
