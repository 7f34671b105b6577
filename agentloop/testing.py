"""Fakes for testing your agents, tools and rewards without a server or a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from agentloop.client.client import GenerateResult
from agentloop.types import StopReason
from agentloop.wire import SamplingParams


@dataclass
class FakeGenerator:
    """Answer each generation with the next of `turns`, cut at `max_new_tokens` as a server would.

    Args:
        turns: ids of each answer, or a function from the prompt's ids to those of the answer.
        stop_ids: a turn that ends in one of these has stop reason `stop`, any other `length`.
        version: policy version of every token.

    `prompts`, `sampling` and `images` record the requests.
    """

    turns: Sequence[Sequence[int]] | Callable[[Sequence[int]], Sequence[int]]
    stop_ids: frozenset[int] = frozenset()
    version: int = 0
    prompts: list[list[int]] = field(default_factory=list)
    sampling: list[SamplingParams] = field(default_factory=list)
    images: list[list[str]] = field(default_factory=list)

    async def generate(
        self,
        input_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        session_id: str,
        rid: str,
        image_data: Sequence[str] = (),
    ) -> GenerateResult:
        self.prompts.append(list(input_ids))
        self.sampling.append(sampling)
        self.images.append(list(image_data))
        turn = self.turns(input_ids) if callable(self.turns) else self.turns[len(self.prompts) - 1]
        ids = list(turn)[: sampling.max_new_tokens]
        stopped = bool(ids) and ids[-1] in self.stop_ids
        return GenerateResult(
            token_ids=ids,
            logprobs=[-0.5] * len(ids),
            versions=[self.version] * len(ids),
            stop_reason=StopReason.STOP if stopped else StopReason.LENGTH,
        )
