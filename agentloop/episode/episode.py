"""`Episode`: the agent loop's view of an episode. Messages to the loop, token ids to the server."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

from agentloop.client.client import GenerateResult
from agentloop.config import AgentConfig
from agentloop.episode.branch import Branch
from agentloop.episode.budget import EpisodeEnd
from agentloop.episode.calls import (
    assistant_message,
    cut_output,
    malformed_messages,
    off_loop_if_long,
    result_message,
    run_calls,
)
from agentloop.episode.images import base64_of, named_images
from agentloop.episode.law import check_placeholders
from agentloop.episode.ledger import TokenLedger
from agentloop.episode.messages import plain_messages
from agentloop.episode.shared import Shared
from agentloop.errors import ServerError
from agentloop.images import images_of
from agentloop.tool.session import CONVERTED
from agentloop.trace.spans import OpenSpan
from agentloop.types import (
    AttributeValue,
    Message,
    StepReward,
    StopReason,
    Task,
    ToolCall,
    ToolResult,
    Trajectory,
    Turn,
)
from agentloop.wire import SamplingParams

T = TypeVar("T")


class Episode:
    """One sample of one task: a `Shared`, common to all forks, and a `Branch` of its own.

    There is no other state: an attribute added here would be lost in a fork.

    Args:
        shared: the parts common to all branches.
        branch: the trajectory that this object works on.
    """

    def __init__(self, shared: Shared, branch: Branch) -> None:
        self._shared = shared
        self._branch = branch

    @classmethod
    def start(cls, shared: Shared, tool_schemas: list[dict[str, Any]]) -> Episode:
        """Return a new episode of a row, which offers these tools to the model."""
        prompt = shared.task.prompt
        branch = Branch(messages=list(prompt), tools=tool_schemas or None, images=[])
        return cls(shared, branch)

    # -- what a loop reads -------------------------------------------------------------------------

    @property
    def task(self) -> Task:
        """The dataset row."""
        return self._shared.task

    @property
    def config(self) -> AgentConfig:
        """The agent's limits."""
        return self._shared.config

    @property
    def group_id(self) -> str:
        return self._shared.group_id

    @property
    def sample_index(self) -> int:
        """The index of this sample in its group, from 0."""
        return self._shared.sample_index

    @property
    def messages(self) -> list[Message]:
        """The conversation so far. Add to it with `observe` only."""
        return self._branch.messages

    @property
    def turns(self) -> list[Turn]:
        """The generations so far."""
        return self._branch.turns

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """Schemas offered to the model. To offer none, set it to None before `generate`."""
        return self._branch.tools

    @tools.setter
    def tools(self, schemas: list[dict[str, Any]] | None) -> None:
        self._branch.tools = schemas

    @property
    def stop_reason(self) -> StopReason:
        """Why the last generation, or the episode, ended."""
        return self._branch.stop_reason

    @stop_reason.setter
    def stop_reason(self, reason: StopReason) -> None:
        self._branch.stop_reason = reason

    @property
    def step_rewards(self) -> list[StepReward]:
        return self._branch.step_rewards

    @property
    def metrics(self) -> Mapping[str, float]:
        """Counters and seconds so far, by name; read-only."""
        # Not a plain copy: a value that an agent writes into one would be lost in silence.
        return MappingProxyType(self._branch.metrics.as_dict())

    # -- what a loop calls -------------------------------------------------------------------------

    def check_budget(self) -> None:
        """End the episode if no further generation is allowed.

        Raises:
            EpisodeEnd: assistant turns, response tokens, episode tokens or context are used up.
        """
        ledger = self._branch.ledger
        self._room(len(ledger), ledger.response_length)

    async def generate(self, **sampling: Any) -> Turn:
        """Sample a turn; return it, and append it to `messages`.

        Args:
            sampling: changes to the recipe's sampling for this turn: any field of
                `agentloop.wire.SamplingParams`.

        Raises:
            EpisodeEnd: assistant turns, response tokens, episode tokens or context are used up.
            ServerError: the server did not answer, or aborted the turn.
            ValueError: the model spoke last, and nothing was observed since.
        """
        start_ns = self._shared.recorder.now()
        await self._render_pending()
        branch, budget = self._branch, self._shared.budget
        ledger = branch.ledger
        room, out_of_room = self._room(len(ledger), ledger.response_length)
        params = self._sampling_params(sampling, room)
        most = params.max_new_tokens

        # The budget is charged before the request, since forks may generate at the same time.
        order, prompt_digest = budget.generations, ledger.digest
        rid = f"{self._shared.session_id}/{order}-{time.monotonic_ns():x}"
        budget.generations += 1
        budget.tokens += most
        with self._shared.recorder.span("turn", start_ns, request_id=rid):
            return await self._sample(params, rid, order, prompt_digest, out_of_room if most == room else None)

    async def call_tools(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """Run a turn's calls and observe their results, in the order of the calls.

        At most `max_parallel_calls` run at once. Calls beyond `max_calls_per_turn` or
        `max_calls_per_episode` are answered with a message. A result's reward becomes a step reward
        of the turn that made the call.

        Raises:
            EpisodeEnd: the model called a tool after the message that the episode's calls are used
                up.
            ToolError: a tool's machinery failed, or it returned an image that cannot be used.
            RewardError: a tool gave a reward that is not a finite number.
        """
        admitted, refusals = self._within_budget(self._shared.budget.admit_calls, len(calls))
        begin = time.perf_counter()
        results = (
            await run_calls(self._shared.session, calls[:admitted], self.config, self._shared.images)
            if admitted
            else []
        )
        results += [ToolResult(f"Error: {refusal}", error=refusal) for refusal in refusals]

        metrics = self._branch.metrics
        metrics.tool_s += time.perf_counter() - begin
        metrics.tool_calls += len(results)
        limit = self.config.max_tool_response_tokens
        for call, result in zip(calls, results, strict=True):
            metrics.tool_errors += result.error is not None
            if converted := result.metrics.get(CONVERTED):
                metrics.converted_arguments = (metrics.converted_arguments or 0.0) + converted
            if result.reward is not None:
                self.add_reward(call.name, result.reward)
            text = await cut_output(result.text, limit, self._shared.renderer)
            self.observe(result_message(call, result, text))
        return results

    def answer_malformed(self, turn: Turn) -> None:
        """Tell the model why its malformed calls were not run."""
        for message in malformed_messages(turn, self._shared.renderer):
            self.observe(message)

    async def respond(self) -> bool:
        """Let the row's interaction answer the model's last turn, and observe its answer.

        Its reward becomes a step reward of that turn.

        Returns:
            Whether the model continues: False if the interaction is done, or the row has none.

        Raises:
            EpisodeEnd: the answer would exceed `max_user_turns`.
            InteractionError: it raised, took too long, or its answer is invalid.
        """
        interaction, metrics = self._shared.interaction, self._branch.metrics
        if interaction is None:
            return False

        begin = time.perf_counter()
        with self.span("interaction", interaction=interaction.name) as running:
            response = await interaction.respond(self.messages, self.config.interaction_timeout_s)
            if response.reward is not None:
                running.set(score=response.reward)
        metrics.interaction_s = (metrics.interaction_s or 0.0) + time.perf_counter() - begin
        if response.reward is not None:
            self.add_reward(interaction.name, response.reward)
        if response.done:
            self.messages.extend(response.messages)  # for the trace only: the model never sees them
            return False
        self.observe(*response.messages)
        return True

    def observe(self, *messages: Message) -> None:
        """Add messages of a tool, a user or an environment. They are never trained.

        The messages between two generations count as one user turn, unless all are tool messages.

        Raises:
            EpisodeEnd: they would exceed `max_user_turns`; no message is added.
            ValueError: one is not a message.
        """
        branch, plain = self._branch, plain_messages(messages)
        if branch.ledger:
            if not branch.user_spoke and any(message["role"] != "tool" for message in plain):
                self._within_budget(self._shared.budget.add_user_turn)
                branch.user_spoke = True
                branch.metrics.user_turns += 1
            branch.pending.extend(plain)
        branch.messages.extend(plain)

    def add_reward(self, name: str, value: float, turn: Turn | None = None) -> None:
        """Add a step reward, for the token span of its turn and for a sum in `reward_parts`.

        Args:
            name: its name in `reward_parts`.
            value: finite.
            turn: a turn of this trajectory; None: the last one. In a fork without a turn, the last
                one before the fork.

        Raises:
            RewardError: it is not a finite number.
            ValueError: there is no such turn.
        """
        self._branch.add_reward(name, value, turn)

    def span(self, name: str, /, **attributes: AttributeValue) -> OpenSpan:
        """Time a part of the agent, as in `with episode.span("plan", depth=2):`.

        What runs inside is shown inside it: turns, tool calls and spans of its own, also those of
        tasks started there. An exception ends it as an error, a cancellation as cancelled.

        Args:
            attributes: text, numbers or booleans; `with ... as span` adds more by `span.set`.
        """
        return self._shared.recorder.span(name, None, **attributes)

    def fork(self, messages: Sequence[Message] | None = None) -> Episode:
        """Start another trajectory beside this one, for sub-agents and branches (metric `forks`).

        It shares this episode's budgets and tools. `max_response_tokens` and the context count
        separately for each.

        Args:
            messages: the start of the new trajectory; None: a copy of this one's past. The copy is
                masked, so that no sampled token trains twice.
        """
        return Episode(self._shared, self._branch.fork(None if messages is None else plain_messages(messages)))

    def rewrite(self, messages: Sequence[Message]) -> None:
        """Continue from other messages, for loops that change their history; counted as a fork.

        The tokens so far stay a separate trajectory. The next generation renders `messages` from
        their start.
        """
        self._branch.rewrite(plain_messages(messages))

    # -- what the runner calls ---------------------------------------------------------------------

    def trajectories(self) -> list[Trajectory]:
        """Return the finished sequences: forks first, this one last; none for unsampled branches.

        An episode without a sampled turn returns one empty trajectory, to be counted and traced.
        """
        task = self.task
        identity: dict[str, Any] = {
            "agent_name": task.agent_name,
            "task_id": task.task_id,
            "data_source": task.data_source,
            "group_id": self.group_id,
            "sample_index": self.sample_index,
            "trace_id": self._shared.recorder.trace_id,
        }
        return self._branch.trajectories(identity) or [
            TokenLedger().trajectory(
                **identity, messages=self.messages, stop_reason=self.stop_reason, metrics=self._branch.metrics.as_dict()
            )
        ]

    # -- inside ------------------------------------------------------------------------------------

    async def _render_pending(self) -> None:
        """Append the pending messages to the ledger; end the episode if no room is left."""
        branch, renderer = self._branch, self._shared.renderer
        ledger = branch.ledger
        if not ledger:
            with named_images(list(branch.messages), self.task):
                messages = branch.messages[:] = await self._shared.images.load(branch.messages)
                ids = await off_loop_if_long(messages, renderer.start, messages, branch.tools)
            self._room(len(ids), 0)
            ledger.add_prompt(ids)
            branch.images = list(images_of(messages))
            return

        if not branch.pending:
            raise ValueError("the model spoke last: observe() something before generate() again")
        observed = list(branch.pending)
        with named_images(observed, self.task):
            pending = await self._shared.images.load(observed)
            ids = await off_loop_if_long(
                pending, renderer.extend, ledger.token_ids, branch.turn_stop, pending, branch.tools
            )
        self._room(len(ledger) + len(ids), ledger.response_length + len(ids))
        ledger.add_observed(ids)
        branch.show(observed, pending)

    def _sampling_params(self, changes: dict[str, Any], room: int) -> SamplingParams:
        """Merge the recipe's sampling with a turn's changes, within the tokens that are left."""
        own = {
            "sampling_seed": self._turn_seed(),
            "stop_token_ids": self._shared.renderer.stop_token_ids or None,
        }
        room = min(self.config.max_turn_tokens or room, room)
        return SamplingParams.merged(self._shared.sampling, {**own, **changes}, room=room)

    async def _sample(
        self, params: SamplingParams, rid: str, order: int, prompt_digest: int, cut: StopReason | None
    ) -> Turn:
        """Send a turn's request and add its answer; `cut`: why the episode ends if it is cut."""
        shared, branch, ledger = self._shared, self._branch, self._branch.ledger
        budget, most = shared.budget, params.max_new_tokens
        sampled = 0
        begin = time.perf_counter()
        try:
            with shared.recorder.span("generate", request_id=rid):
                result = await self._ask(params, rid)
            sampled = len(result.token_ids)
        finally:
            budget.tokens += sampled - most
        seconds = time.perf_counter() - begin

        await shared.pacer.turn()
        branch.metrics.generate_s += seconds
        with shared.recorder.span("parse"):
            turn = self._read_turn(result, order, latency_s=seconds, request_id=rid, prompt_digest=prompt_digest)
        ledger.add_sampled(turn, result.token_ids, result.logprobs, result.versions)

        branch.metrics.malformed_calls += len(turn.malformed_calls)
        branch.user_spoke, branch.turn_stop = False, turn.stop_reason
        out_of_room = cut if turn.stop_reason is StopReason.LENGTH else None
        branch.stop_reason = out_of_room or turn.stop_reason
        branch.messages.append(assistant_message(turn))
        if turn.stop_reason is StopReason.ABORT:
            # The model did not end this turn: mask the episode instead of scoring it.
            raise ServerError("the server aborted a generation")
        return turn

    async def _ask(self, params: SamplingParams, rid: str) -> GenerateResult:
        branch, shared = self._branch, self._shared
        if shared.renderer.image_token is not None:
            check_placeholders(branch.ledger.token_ids, shared.renderer.image_token, len(branch.images))
        images = {"image_data": await base64_of(branch.images)} if branch.images else {}
        return await shared.generator.generate(
            branch.ledger.token_ids, params, session_id=shared.session_id, rid=rid, **images
        )

    def _read_turn(self, result: GenerateResult, order: int, **request: Any) -> Turn:
        """Parse a sampled turn; `request`: fields of `Turn`. The ledger adds the token span."""
        renderer = self._shared.renderer
        parsed = renderer.parse(result.token_ids, self.tools)
        for number, call in enumerate(parsed.tool_calls):
            call.id = renderer.call_id(call.id, order, number)

        return Turn(
            start=0,
            end=0,
            text=parsed.text,
            stop_reason=result.stop_reason,
            tool_calls=parsed.tool_calls,
            malformed_calls=parsed.malformed_calls,
            reasoning=parsed.reasoning,
            cached_tokens=result.cached_tokens,
            order=order,
            **request,
        )

    def _room(self, length: int, response_length: int) -> tuple[int, StopReason]:
        return self._within_budget(self._shared.budget.room, length, response_length)

    def _within_budget(self, check: Callable[..., T], *arguments: int) -> T:
        """Call a method of the budget; if it ends the episode, keep the reason."""
        try:
            return check(*arguments)
        except EpisodeEnd as end:
            self._branch.stop_reason = end.reason
            raise

    def _turn_seed(self) -> int | None:
        """Return the next turn's seed: distinct by sample, fork and turn; the same on resume."""
        shared, branch = self._shared, self._branch
        if shared.seed is None:
            return None
        key = f"{shared.seed}/{shared.session_id}{branch.path}/{len(branch.turns)}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 1
