"""What a dead replica had already sampled of an answer, and how another one goes on from there."""

from __future__ import annotations

from dataclasses import replace

from agentloop.wire import VersionSpan
from rollout_server.engines.base import AnswerChunk, Generation, GenerationResult


class PartialAnswer:
    """The part of one answer that outlived its replicas.

    Sampling goes on exactly where it stopped: the kept tokens become prompt, and the uniform numbers of a seeded
    request depend on a token's position alone. Penalties look back at sampled tokens only, so requests that have them
    start again; so do those with images, whose kept tokens may not be taken for more of them.
    """

    def __init__(self, generation: Generation, stream_tokens: int) -> None:
        self._generation = generation
        self._piece_tokens = stream_tokens
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._spans: list[VersionSpan] = []
        self._base = 0  # tokens of replicas that died

    @property
    def tokens(self) -> int:
        """How many tokens are kept."""
        return len(self._ids)

    def rest(self) -> Generation:
        """The request for what is still to be sampled."""
        self._base = len(self._ids)
        whole = self._generation
        sampling = whole.sampling
        if self._ids:
            sampling = sampling.model_copy(update={"max_new_tokens": sampling.max_new_tokens - self._base})
        every = min(self._piece_tokens, whole.stream_tokens) if whole.on_chunk is not None else self._piece_tokens
        return replace(
            whole,
            input_ids=whole.input_ids + self._ids,
            sampling=sampling,
            on_chunk=self._keep,
            stream_tokens=every,
        )

    def whole(self, result: GenerationResult) -> GenerationResult:
        """The answer as one, when `result` is that of the last `rest`."""
        base = self._base
        if base:
            result.output_ids = self._ids[:base] + result.output_ids
            result.logprobs = self._logprobs[:base] + result.logprobs
            result.spans = joined(self._spans_until(base), result.spans, base)
            result.cached_tokens = min(result.cached_tokens, len(self._generation.input_ids))
        return result

    def finished(self) -> GenerationResult | None:
        """The answer, when nothing is left to sample: its replica died between the last token and the answer."""
        if len(self._ids) < self._generation.sampling.max_new_tokens:
            return None
        spans = self._spans_until(len(self._ids))
        return GenerationResult(
            self._ids, self._logprobs, spans, "length", None, cached_tokens=0, weight_version=spans[-1].version
        )

    def _keep(self, piece: AnswerChunk) -> None:
        self._ids += piece.output_ids
        self._logprobs += piece.logprobs
        self._spans = joined(self._spans_until(self._base), piece.spans, self._base)
        if self._generation.on_chunk is not None:
            self._generation.on_chunk(replace(piece, spans=self._spans))

    def _spans_until(self, end: int) -> list[VersionSpan]:
        return [s.model_copy(update={"end": min(s.end, end)}) for s in self._spans if s.start < end]


def joined(first: list[VersionSpan], second: list[VersionSpan], offset: int) -> list[VersionSpan]:
    """The spans of two parts of one answer, the second of which starts at token `offset`."""
    spans = list(first)
    for span in second:
        moved = VersionSpan(version=span.version, start=span.start + offset, end=span.end + offset)
        if spans and spans[-1].version == moved.version and spans[-1].end == moved.start:
            spans[-1] = spans[-1].model_copy(update={"end": moved.end})
        else:
            spans.append(moved)
    return spans


def can_go_on(generation: Generation) -> bool:
    """Whether a cut answer can be continued with the same distribution for every token still to come."""
    sampling = generation.sampling
    looks_back = (
        sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.repetition_penalty != 1.0
        or sampling.min_new_tokens
    )
    return not looks_back and not generation.image_data
