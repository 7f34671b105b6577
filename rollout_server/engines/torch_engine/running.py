"""A request while the engine works on it."""

from __future__ import annotations

from dataclasses import dataclass, field

from agentloop.wire import VersionSpan
from rollout_server.engines.base import AnswerChunk, FinishType, Generation, GenerationResult
from rollout_server.engines.torch_engine.cache.rows import Row
from rollout_server.engines.torch_engine.model.images import ImagePrompt
from rollout_server.engines.torch_engine.sampling.sampling import RowSampling


@dataclass(slots=True, eq=False)
class Running:
    """A request and what it has produced.

    `ids` is the prompt and then every sampled token; where the prompt holds images, their lookup ids.
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
    told: int = 0

    @property
    def prompt_length(self) -> int:
        return len(self.generation.input_ids)

    @property
    def counted(self) -> list[int]:
        """The sampled tokens, for edits that count them; a preemption and a new policy version do not change them."""
        return self.ids[self.prompt_length :] if self.sampling.edits else []

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

    def next_piece(self) -> AnswerChunk | None:
        """What was sampled since the piece before, when it is enough for one."""
        count = len(self.logprobs)
        if count - self.told < self.generation.stream_tokens:
            return None
        start, self.told = self.told, count
        return AnswerChunk(self.ids[self.prompt_length + start :], self.logprobs[start:], self.spans())
