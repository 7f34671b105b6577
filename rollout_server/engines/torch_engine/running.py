"""A request in the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from agentloop.wire import VersionSpan
from rollout_server.engines.base import AnswerChunk, FinishType, Generation, GenerationResult
from rollout_server.engines.torch_engine.cache.rows import Row
from rollout_server.engines.torch_engine.model.images import ImagePrompt
from rollout_server.engines.torch_engine.sampling.sampling import RowSampling


@dataclass(slots=True, eq=False)
class Running:
    """A request and its sampled tokens.

    Attributes:
        ids: the prompt and then every sampled token. Pads of images are replaced by lookup ids
            (`ImagePrompt`).
        limit: length of `ids` at which the request ends.
        version: of the weights that sample its next token.
        row: its row of the cache; None while it waits.
        version_starts: (version, number of tokens sampled when it ended), for each earlier version.
        cached_tokens: prompt tokens that were in the cache at its first admission.
        sent: number of sampled tokens in the chunks that were streamed.
    """

    generation: Generation
    ids: list[int]
    limit: int
    stops: frozenset[int]
    sampling: RowSampling
    version: str
    images: ImagePrompt | None = None
    row: Row | None = None
    logprobs: list[float] = field(default_factory=list)
    version_starts: list[tuple[str, int]] = field(default_factory=list)
    cached_tokens: int | None = None
    result: GenerationResult | None = None
    sent: int = 0

    @property
    def prompt_length(self) -> int:
        return len(self.generation.input_ids)

    @property
    def counted(self) -> list[int]:
        """The sampled tokens that penalties count: all, across preemptions and policy versions."""
        return self.ids[self.prompt_length :] if self.sampling.penalties else []

    @property
    def missing(self) -> int:
        """Number of tokens to prefill before the last one can be decoded."""
        return len(self.ids) - 1 - (self.row.filled if self.row else 0)

    def set_version(self, version: str) -> None:
        """Sample the next tokens under `version`."""
        self.version_starts.append((self.version, len(self.logprobs)))
        self.version = version

    def spans(self) -> list[VersionSpan]:
        """The sampled tokens by the policy version that sampled them; without empty spans."""
        spans: list[VersionSpan] = []
        start = 0
        for version, end in [*self.version_starts, (self.version, len(self.logprobs))]:
            if end > start and spans and spans[-1].version == version:
                spans[-1] = VersionSpan(version=version, start=spans[-1].start, end=end)
            elif end > start:
                spans.append(VersionSpan(version=version, start=start, end=end))
            start = end
        return spans

    def finish(self, finish: FinishType, matched: int | None = None, message: str | None = None) -> None:
        """Set `result`; `matched` is the stop token."""
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

    def next_chunk(self) -> AnswerChunk | None:
        """Return the tokens since the last chunk; None if fewer than `stream_tokens`."""
        count = len(self.logprobs)
        if count - self.sent < self.generation.stream_tokens:
            return None

        start, self.sent = self.sent, count
        return AnswerChunk(self.ids[self.prompt_length + start :], self.logprobs[start:], self.spans())
