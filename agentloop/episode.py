"""`Episode`: what a loop sees. It speaks messages to the loop and ids to the server, and writes the ledger between."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Coroutine, Sequence
from typing import Any

from agentloop.chat import ChatRenderer
from agentloop.client import Generator
from agentloop.config import AgentConfig, SamplingConfig
from agentloop.errors import ServerError
from agentloop.ledger import TokenLedger
from agentloop.toolset import ToolSession
from agentloop.types import Message, StopReason, Task, ToolCall, ToolResult, Trajectory, Turn
from agentloop.wire import SamplingParams


class EpisodeEnd(Exception):
    """A budget has run out; the runner ends the episode with this reason. Not an error."""

    def __init__(self, reason: StopReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class Episode:
    """One sample of one task.

    Attributes:
        task: the dataset row.
        messages: the conversation so far; read it freely, add to it through `observe`.
        tools: schemas offered to the model; None before the first `generate` offers none.
        config: the agent's limits.
        group_id, sample_index: which sample of which group this is.
    """

    def __init__(
        self,
        task: Task,
        *,
        renderer: ChatRenderer,
        generator: Generator,
        tools: ToolSession,
        tool_schemas: list[dict[str, Any]],
        config: AgentConfig,
        sampling: SamplingConfig,
        context_length: int,
        seed: int | None = None,
        group_id: str = "",
        sample_index: int = 0,
    ) -> None:
        self.task = task
        self.messages: list[Message] = list(task.prompt)
        self.tools: list[dict[str, Any]] | None = tool_schemas or None
        self.config = config
        self.stop_reason = StopReason.STOP
        self.metrics: dict[str, float] = dict.fromkeys(
            ("tool_calls", "tool_errors", "malformed_calls", "forks", "generate_s", "tool_s"), 0.0
        )
        self.tool_rewards: list[float] = []
        self._renderer = renderer
        self._generator = generator
        self._session = tools
        self._sampling = sampling
        self._context_length = context_length
        self._seed = seed
        self.group_id = group_id
        self.sample_index = sample_index
        self._ledger = TokenLedger()
        self._pending: list[Message] = []
        self._forks: list[Episode] = []

    # -- what a loop calls -------------------------------------------------------------------------------------------

    @property
    def turns(self) -> list[Turn]:
        """The generations so far."""
        return self._ledger.turns

    def check_budget(self) -> None:
        """End the episode here when no further turn is allowed.

        Raises:
            EpisodeEnd: turns, response tokens or context are used up.
        """
        self._room(len(self._ledger), self._ledger.response_length)

    async def generate(self, **sampling: Any) -> Turn:
        """Let the model speak; returns the turn, which is also appended to `messages`.

        Args:
            sampling: changes to the recipe's sampling for this turn: any field of `agentloop.wire.SamplingParams`.

        Raises:
            EpisodeEnd: turns, response tokens or context are used up.
            ServerError: the server could not be brought to answer, or cut the turn off.
            ValueError: the model spoke last, and nothing was observed since.
        """
        self._render_pending()
        room = self._room(len(self._ledger), self._ledger.response_length)
        values = {
            "temperature": self._sampling.temperature,
            "top_p": self._sampling.top_p,
            "top_k": self._sampling.top_k,
            "max_new_tokens": self._sampling.max_new_tokens,
            "sampling_seed": self._turn_seed(),
            **sampling,
        }
        values["max_new_tokens"] = min(values["max_new_tokens"], room)
        session = f"{self.group_id}/{self.sample_index}"
        begin = time.perf_counter()
        result = await self._generator.generate(
            self._ledger.token_ids,
            SamplingParams(**values),
            session_id=session,
            rid=f"{session}/{len(self.turns)}-{time.monotonic_ns():x}",
        )
        seconds = time.perf_counter() - begin
        self.metrics["generate_s"] += seconds
        parsed = self._renderer.parse(result.token_ids)
        turn = Turn(
            start=0,
            end=0,
            text=parsed.text,
            stop_reason=result.stop_reason,
            tool_calls=parsed.tool_calls,
            malformed_calls=parsed.malformed_calls,
            reasoning=parsed.reasoning,
            cached_tokens=result.cached_tokens,
            latency_s=seconds,
        )
        self._ledger.add_sampled(turn, result.token_ids, result.logprobs, result.versions)
        self.metrics["malformed_calls"] += len(parsed.malformed_calls)
        self.stop_reason = result.stop_reason
        self.messages.append(_assistant_message(turn))
        if turn.stop_reason is StopReason.ABORT:
            # Half a turn that the model did not end is no mistake of the model: the episode is masked, not scored.
            raise ServerError("the server aborted a generation")
        return turn

    async def call_tools(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """Run a turn's calls and observe their results, in the order of the calls.

        At most `max_parallel_calls` run at once. Calls beyond `max_calls_per_turn` are answered with a message.

        Raises:
            ToolError: a tool's machinery failed.
        """
        slots = asyncio.Semaphore(self.config.max_parallel_calls)

        async def one(position: int, call: ToolCall) -> ToolResult:
            if position >= self.config.max_calls_per_turn:
                text = f"only {self.config.max_calls_per_turn} calls are run in one turn; this one was not"
                return ToolResult(f"Error: {text}", error=text)
            async with slots:
                return await self._session.call(call, self.config.tool_timeout_s)

        begin = time.perf_counter()
        if len(calls) == 1:  # by far the most frequent, and not worth a task
            results = [await one(0, calls[0])]
        else:
            results = await _all_or_none([one(position, call) for position, call in enumerate(calls)])
        self.metrics["tool_s"] += time.perf_counter() - begin
        self.metrics["tool_calls"] += len(results)
        for call, result in zip(calls, results, strict=True):
            self.metrics["tool_errors"] += result.error is not None
            if result.reward is not None:
                self.tool_rewards.append(result.reward)
            self.observe({"role": "tool", "name": call.name, "content": self._cut(result.text)})
        return results

    def answer_malformed(self, turn: Turn) -> None:
        """Tell the model why its malformed calls were not run."""
        for call in turn.malformed_calls:
            self.observe({"role": "tool", "content": f"Error: the tool call could not be read: {call.reason}"})

    def observe(self, *messages: Message) -> None:
        """Add messages that the model has not written: tool, user or environment. They are never trained."""
        self.messages.extend(messages)
        if self._ledger:
            self._pending.extend(messages)

    def fork(self) -> Episode:
        """A second trajectory with the same past, for loops that rewrite history; counted in the metrics as `forks`.

        Its copy of the past is masked, so that no sampled token trains twice.
        """
        other = Episode.__new__(Episode)
        other.__dict__.update(self.__dict__)
        other.messages = list(self.messages)
        other._pending = list(self._pending)
        other._ledger = self._ledger.copy()
        other._forks = []
        other.metrics = dict.fromkeys(self.metrics, 0.0)
        other.tool_rewards = []
        self._forks.append(other)
        self.metrics["forks"] += 1
        return other

    # -- what the runner calls ---------------------------------------------------------------------------------------

    def trajectories(self) -> list[Trajectory]:
        """The finished sequences: forks first, this one last. Those in which nothing was sampled are left out."""
        found = [trajectory for fork in self._forks for trajectory in fork.trajectories()]
        if self._ledger.turns:
            own = self._ledger.trajectory()
            own.messages, own.stop_reason = self.messages, self.stop_reason
            own.metrics = {**self.metrics, "turns": float(len(self.turns))}
            found.append(own)
        return found

    # -- inside ------------------------------------------------------------------------------------------------------

    def _render_pending(self) -> None:
        """Bring the ledger up to the point where the model speaks next, or end the episode for lack of room."""
        ledger = self._ledger
        if not ledger:
            ids = self._renderer.start(self.messages, self.tools)
            self._room(len(ids), 0)
            ledger.add_prompt(ids)
            return
        if not self._pending:
            raise ValueError("the model spoke last: observe() something before generate() again")
        ids = self._renderer.extend(ledger.token_ids, self.stop_reason, self._pending, self.tools)
        self._room(len(ledger) + len(ids), ledger.response_length + len(ids))
        ledger.add_observed(ids)
        self._pending.clear()

    def _room(self, length: int, response_length: int) -> int:
        """Tokens that the next turn may have."""
        reason = self._limit_reached(length, response_length)
        if reason is not None:
            self.stop_reason = reason
            raise EpisodeEnd(reason)
        return min(self.config.max_response_tokens - response_length, self._context_length - length)

    def _limit_reached(self, length: int, response_length: int) -> StopReason | None:
        if len(self.turns) >= self.config.max_assistant_turns:
            return StopReason.MAX_TURNS
        if response_length >= self.config.max_response_tokens:
            return StopReason.LENGTH
        return StopReason.CONTEXT if length >= self._context_length else None

    def _turn_seed(self) -> int | None:
        """A seed of this turn's own: the same in a resumed run, another for every sample and turn."""
        if self._seed is None:
            return None
        key = f"{self._seed}/{self.group_id}/{self.sample_index}/{len(self.turns)}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 1

    def _cut(self, text: str) -> str:
        """Cut tool output in tokens and mark the cut, so that the model can tell it from a whole one."""
        limit = self.config.max_tool_response_tokens
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair, from a file name perhaps, is no text
        if len(text) * 4 <= limit:  # no character has more than four bytes, and no token less than one
            return text
        ids = self._renderer.encode_text(text)
        if len(ids) <= limit:
            return text
        shown = self._renderer.decode(ids[:limit]).rstrip("\ufffd")
        return f"{shown}\n[cut: the first {limit} of {len(ids)} tokens are shown]"


async def _all_or_none(coroutines: Sequence[Coroutine[Any, Any, ToolResult]]) -> list[ToolResult]:
    """Results in order. When one raises, the others are cancelled, and have ended before it is raised further."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _assistant_message(turn: Turn) -> Message:
    message: Message = {"role": "assistant", "content": turn.text}
    if turn.tool_calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in turn.tool_calls
        ]
    return message
