"""`Episode`: what a loop sees. It speaks messages to the loop and ids to the server, and writes the ledger between."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Coroutine, Sequence
from typing import Any

from agentloop.chat import ChatRenderer
from agentloop.chat.images import image_data, images_of
from agentloop.client.client import Generator
from agentloop.config import AgentConfig, SamplingConfig
from agentloop.episode.budget import Budget, EpisodeEnd
from agentloop.episode.ledger import TokenLedger
from agentloop.errors import RewardError, ServerError
from agentloop.interaction.base import InteractionSession
from agentloop.runtime.pacing import Pacer
from agentloop.tool.session import ToolSession
from agentloop.types import Message, StepReward, StopReason, Task, ToolCall, ToolResult, Trajectory, Turn
from agentloop.wire import SamplingParams

UNREADABLE = "unreadable_call"
"""The name under which malformed calls are answered: some templates write a name beside every result."""

METRICS = ("tool_calls", "tool_errors", "malformed_calls", "user_turns", "forks", "generate_s", "tool_s")


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
        interaction: InteractionSession | None = None,
        pacer: Pacer | None = None,
    ) -> None:
        self.task = task
        self.messages: list[Message] = list(task.prompt)
        self.tools: list[dict[str, Any]] | None = tool_schemas or None
        self.config = config
        self.group_id = group_id
        self.sample_index = sample_index
        self.stop_reason = StopReason.STOP
        self.metrics: dict[str, float] = dict.fromkeys(METRICS, 0.0)
        self.step_rewards: list[StepReward] = []
        self._renderer = renderer
        self._generator = generator
        self._session = tools
        self._interaction = interaction
        self._pacer = pacer or Pacer()
        self._sampling = sampling
        self._budget = Budget(config, context_length)
        self._seed = seed
        self._ledger = TokenLedger()
        self._pending: list[Message] = []
        self._images: list[Any] = list(images_of(task.prompt))
        self._turn_stop = StopReason.STOP
        self._user_spoke = False
        self._path = ""
        self._before: Episode | None = None
        self._forks: list[Episode] = []

    # -- what a loop calls -------------------------------------------------------------------------------------------

    @property
    def turns(self) -> list[Turn]:
        """The generations so far."""
        return self._ledger.turns

    def check_budget(self) -> None:
        """End the episode here when no further generation is allowed.

        Raises:
            EpisodeEnd: assistant turns, response tokens, episode tokens or context are used up.
        """
        self._room(len(self._ledger), self._ledger.response_length)

    async def generate(self, **sampling: Any) -> Turn:
        """Let the model speak; returns the turn, which is also appended to `messages`.

        Args:
            sampling: changes to the recipe's sampling for this turn: any field of `agentloop.wire.SamplingParams`.

        Raises:
            EpisodeEnd: assistant turns, response tokens, episode tokens or context are used up.
            ServerError: the server could not be brought to answer, or cut the turn off.
            ValueError: the model spoke last, and nothing was observed since.
        """
        self._render_pending()
        ledger, budget = self._ledger, self._budget
        room, out_of_room = self._room(len(ledger), ledger.response_length)
        own = {"sampling_seed": self._turn_seed(), "stop_token_ids": self._renderer.stop_token_ids or None}
        params = SamplingParams.merged(
            self._sampling, {**own, **sampling}, room=min(self.config.max_turn_tokens or room, room)
        )
        most = params.max_new_tokens
        session = f"{self.group_id}/{self.sample_index}"
        order, digest = budget.generations, ledger.digest
        rid = f"{session}/{order}-{time.monotonic_ns():x}"
        budget.generations += 1
        budget.tokens += most  # forks may generate at the same time
        sampled = 0
        begin = time.perf_counter()
        try:
            images = {"image_data": [image_data(image) for image in self._images]} if self._images else {}
            result = await self._generator.generate(ledger.token_ids, params, session_id=session, rid=rid, **images)
            sampled = len(result.token_ids)
        finally:
            budget.tokens += sampled - most
        seconds = time.perf_counter() - begin
        await self._pacer.turn()
        self.metrics["generate_s"] += seconds
        parsed = self._renderer.parse(result.token_ids, self.tools)
        for number, call in enumerate(parsed.tool_calls):
            call.id = self._renderer.call_id(call.id, order, number)
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
            request_id=rid,
            order=order,
            prompt_digest=digest,
        )
        ledger.add_sampled(turn, result.token_ids, result.logprobs, result.versions)
        self.metrics["malformed_calls"] += len(parsed.malformed_calls)
        self._user_spoke, self._turn_stop = False, turn.stop_reason
        cut = turn.stop_reason is StopReason.LENGTH and most == room
        self.stop_reason = out_of_room if cut else turn.stop_reason
        self.messages.append(_assistant_message(turn))
        if turn.stop_reason is StopReason.ABORT:
            # Half a turn that the model did not end is no mistake of the model: the episode is masked, not scored.
            raise ServerError("the server aborted a generation")
        return turn

    async def call_tools(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """Run a turn's calls and observe their results, in the order of the calls.

        At most `max_parallel_calls` run at once. Calls beyond `max_calls_per_turn` or `max_calls_per_episode` are
        answered with a message. A result's reward becomes a step reward of the turn that made the call.

        Raises:
            EpisodeEnd: the model called a tool after it was told that the episode's calls are used up.
            ToolError: a tool's machinery failed.
            RewardError: a tool gave a reward that is no finite number.
        """
        try:
            admitted, refusals = self._budget.admit_calls(len(calls))
        except EpisodeEnd as end:
            self.stop_reason = end.reason
            raise
        begin = time.perf_counter()
        results: list[ToolResult] = []
        if admitted == 1:  # by far the most frequent, and not worth a task
            results = [await self._session.call(calls[0], self.config.tool_timeout_s)]
        elif admitted:
            results = await self._run_calls(calls[:admitted])
        results += [ToolResult(f"Error: {refusal}", error=refusal) for refusal in refusals]
        self.metrics["tool_s"] += time.perf_counter() - begin
        self.metrics["tool_calls"] += len(results)
        for call, result in zip(calls, results, strict=True):
            self.metrics["tool_errors"] += result.error is not None
            if result.reward is not None:
                self.add_reward(call.name, result.reward)
            message: Message = {"role": "tool", "name": call.name, "content": self._cut(result.text)}
            if call.id:
                message["tool_call_id"] = call.id
            if result.images:
                pictures = [{"type": "image", "image": image} for image in result.images]
                message["content"] = [*pictures, {"type": "text", "text": message["content"]}]
            self.observe(message)
        return results

    def answer_malformed(self, turn: Turn) -> None:
        """Tell the model why its malformed calls were not run."""
        for number, call in enumerate(turn.malformed_calls, len(turn.tool_calls)):
            self.observe(
                {
                    "role": "tool",
                    "name": UNREADABLE,
                    "tool_call_id": self._renderer.call_id("", turn.order, number),
                    "content": f"Error: the tool call could not be read: {call.reason}",
                }
            )

    async def respond(self) -> bool:
        """Let the row's interaction answer the model's last turn, and observe what it says.

        Its reward becomes a step reward of that turn.

        Returns:
            Whether the model is to speak again: False when the interaction is done, or the row has none.

        Raises:
            EpisodeEnd: it would be one turn of the user more than `max_user_turns`.
            InteractionError: it raised, took too long, or answered in no usable form.
        """
        if self._interaction is None:
            return False
        begin = time.perf_counter()
        response = await self._interaction.respond(self.messages, self.config.interaction_timeout_s)
        self.metrics["interaction_s"] = self.metrics.get("interaction_s", 0.0) + time.perf_counter() - begin
        if response.reward is not None:
            self.add_reward(self._interaction.name, float(response.reward))
        if response.done:
            self.messages.extend(response.messages)  # the model will not read it: it is in the trace alone
            return False
        self.observe(*response.messages)
        return True

    def observe(self, *messages: Message) -> None:
        """Add messages that the model has not written: tool, user or environment. They are never trained.

        What is observed between two generations is one turn of the user when a message of it is no tool's.

        Raises:
            EpisodeEnd: it would be one turn of the user more than `max_user_turns`; nothing is added then.
        """
        if self._ledger:
            if not self._user_spoke and any(message["role"] != "tool" for message in messages):
                try:
                    self._budget.add_user_turn()
                except EpisodeEnd as end:
                    self.stop_reason = end.reason
                    raise
                self._user_spoke = True
                self.metrics["user_turns"] += 1
            self._pending.extend(messages)
        self.messages.extend(messages)
        self._images.extend(images_of(messages))

    def add_reward(self, name: str, value: float, turn: Turn | None = None) -> None:
        """Note a step reward: it reaches the trajectory with its turn's token span, and its sum in `reward_parts`.

        Args:
            name: what it is for.
            value: finite.
            turn: one of this episode's own turns; None: the last one. In a fork that has not generated yet, that is
                the last one before the fork.

        Raises:
            RewardError: it is no finite number.
            ValueError: there is no such turn.
        """
        if not math.isfinite(value):
            raise RewardError(f"the step reward {name!r} is {value}, which is no finite number", "give finite rewards")
        if turn is None:
            owner = self
            while not owner.turns and owner._before is not None:
                owner = owner._before
            if not owner.turns:
                raise ValueError(f"the step reward {name!r} comes before the model spoke: generate() first")
            turn = owner.turns[-1]
        elif any(turn is own for own in self.turns):
            owner = self
        else:
            raise ValueError(f"the step reward {name!r} is for a turn of another trajectory")
        owner.step_rewards.append(StepReward(name, float(value), turn.start, turn.end))

    def fork(self, messages: Sequence[Message] | None = None) -> Episode:
        """A further trajectory beside this one, for sub-agents and branches; counted in the metrics as `forks`.

        It shares this episode's budgets and tools. `max_response_tokens` and the context count for each alone.

        Args:
            messages: what the new trajectory begins with; None: the whole past of this one. Its copy of the past is
                masked, so that no sampled token trains twice.
        """
        other = Episode.__new__(Episode)
        other.__dict__.update(self.__dict__)
        if messages is None:
            other.messages = list(self.messages)
            other._pending = list(self._pending)
            other._images = list(self._images)
            other._ledger = self._ledger.copy()
        else:
            other.messages, other._pending, other._ledger = list(messages), [], TokenLedger()
            other._images = list(images_of(messages))
        other._path = f"{self._path}/{len(self._forks)}"
        other._before = self
        other._forks = []
        other.metrics = dict.fromkeys(METRICS, 0.0)
        other.step_rewards = []
        self._forks.append(other)
        self.metrics["forks"] += 1
        return other

    def rewrite(self, messages: Sequence[Message]) -> None:
        """Go on from other messages, for loops that shorten or change their history; counted as a fork.

        What was sampled so far stays a trajectory of its own. The next generation renders `messages` from their start.
        """
        closed = self.fork([])
        closed.messages, closed._ledger, closed.step_rewards = self.messages, self._ledger, self.step_rewards
        closed._before, closed._images = self._before, self._images
        self._images = list(images_of(messages))
        self.messages, self._pending, self._ledger, self.step_rewards = list(messages), [], TokenLedger(), []
        self._before = closed
        self._path = f"{self._path}/{len(self._forks)}"

    # -- what the runner calls ---------------------------------------------------------------------------------------

    def trajectories(self) -> list[Trajectory]:
        """The finished sequences: forks first, this one last. Those in which nothing was sampled are left out."""
        found = [trajectory for fork in self._forks for trajectory in fork.trajectories()]
        if self._ledger.turns:
            own = self._ledger.trajectory()
            own.messages, own.stop_reason = self.messages, self.stop_reason
            own.step_rewards, own.images = self.step_rewards, self._images
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
        ids = self._renderer.extend(ledger.token_ids, self._turn_stop, self._pending, self.tools)
        self._room(len(ledger) + len(ids), ledger.response_length + len(ids))
        ledger.add_observed(ids)
        self._pending.clear()

    def _room(self, length: int, response_length: int) -> tuple[int, StopReason]:
        try:
            return self._budget.room(length, response_length)
        except EpisodeEnd as end:
            self.stop_reason = end.reason
            raise

    async def _run_calls(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        slots = asyncio.Semaphore(self.config.max_parallel_calls)

        async def one(call: ToolCall) -> ToolResult:
            async with slots:
                return await self._session.call(call, self.config.tool_timeout_s)

        return await _all_or_none([one(call) for call in calls])

    def _turn_seed(self) -> int | None:
        """A seed of this turn's own: the same in a resumed run, another for every sample, fork and turn."""
        if self._seed is None:
            return None
        key = f"{self._seed}/{self.group_id}/{self.sample_index}{self._path}/{len(self.turns)}".encode()
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
            {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
            for call in turn.tool_calls
        ]
    if turn.reasoning is not None:
        message["reasoning_content"] = turn.reasoning
    return message
