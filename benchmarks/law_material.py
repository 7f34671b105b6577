"""Input of `token_law.py`: random texts, scripted turns, the engine that returns them, and the
agent.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agentloop.agent.base import AgentLoop
from agentloop.client.client import GenerateResult
from agentloop.episode.episode import Episode
from agentloop.tool.base import Tool
from agentloop.types import Message, StopReason, Task, ToolResult
from agentloop.wire import SamplingParams

BLOCK = 1 << 18
LIMITS: dict[str, dict[str, int]] = {
    "roomy": {"max_assistant_turns": 40, "max_response_tokens": 100_000, "max_tool_response_tokens": 512},
    "few_turns": {"max_assistant_turns": 5, "max_response_tokens": 100_000, "max_tool_response_tokens": 512},
    "few_tokens": {"max_assistant_turns": 40, "max_response_tokens": 300, "max_tool_response_tokens": 16},
}
"""Agent limits. Most episodes end with their script, the others at a limit."""

SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks something up.",
        "parameters": {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]},
    },
}
WORDS = ["the", "sum", "of", "two", "numbers", "is", "42,", "page", "7:", '{"a":', "[2.5,", "null]}", "don't", "<b>"]
WORDS += ["\n", "\n\n#", "\t", "", "value\n  "]
ODD = (
    "",
    " ",
    "\n",
    "\n\n",
    "  x",
    "x  ",
    "\r\n",
    "é",
    "e\u0301",
    "漢字",
    "🙂‍↔️",
    "\u200b",
    "０１",
    "user\n",
    "assistant\n",
)
BREAKS = ("abort", "nan", "lengths")
"""Faults of a broken engine: it aborts a turn, returns NaN as a logprob, or fewer logprobs than
ids.
"""


class Chance:
    """A seeded source of random ids and texts. The ids cover the whole vocabulary, control tokens
    included.

    Args:
        seed: of all random numbers.
        vocabulary: ids are below it. Models have more rows than the tokenizer has tokens, and may
            sample them.
        controls: control tokens, spelling to id; spelled in texts, and put into turns as ids.
    """

    def __init__(self, seed: int, vocabulary: int, controls: dict[str, int]) -> None:
        self.random = random.Random(seed)
        self._numbers = np.random.default_rng(seed)
        self._vocabulary = vocabulary
        self._spellings = list(controls)
        self._control_ids = list(controls.values())
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._at = 0

    def sampled(self, count: int) -> tuple[list[int], list[float]]:
        """Return `count` random ids with random logprobs."""
        if self._at + count > len(self._ids):
            self._ids = self._numbers.integers(0, self._vocabulary, BLOCK).tolist()
            self._logprobs = (-self._numbers.exponential(2.0, BLOCK)).tolist()
            self._at = 0

        begin, self._at = self._at, self._at + count
        ids = self._ids[begin : self._at]
        if ids and self.random.random() < 0.25:
            ids[int(self.random.random() * count)] = self.random.choice(self._control_ids)
        return ids, self._logprobs[begin : self._at]

    def length(self) -> int:
        """Return the number of tokens of a turn: mostly few, sometimes none, rarely hundreds."""
        draw = self.random.random()
        return int(draw * 30) if draw < 0.98 else int((draw - 0.98) * 20_000)

    def text(self) -> str:
        """Return text of a tool, a page or a user: words, any script, spelled control tokens, or
        nothing.
        """
        draw = self.random.random()
        if draw < 0.5:
            return " ".join(self.random.choices(WORDS, k=int(draw * 24)))
        if draw < 0.75:
            return self.random.choice(ODD) + " ".join(self.random.choices(WORDS, k=3)) + self.random.choice(ODD)
        if draw < 0.9:
            return "".join(chr(self._character()) for _ in range(int((draw - 0.75) * 100)))

        pieces = [self.random.choice(self._spellings), *self.random.choices(WORDS, k=2), self.random.choice(ODD)]
        self.random.shuffle(pieces)
        return self.random.choice(("", " ", "\n")).join(pieces)

    def _character(self) -> int:
        # No surrogates, which are not text, and no private-use characters: the renderer uses one of
        # them.
        draw = self.random.random()
        if draw < 0.6:
            return 0x20 + int(draw * 3000)
        return 0x10000 + int((draw - 0.6) * 0x30000)


@dataclass(slots=True)
class Scripted:
    """One turn that the engine will return, and the messages after it if it calls no tool."""

    ids: list[int]
    logprobs: list[float]
    versions: list[int]
    stop: StopReason
    observed: list[Message]
    breaks: str | None = None


@dataclass(slots=True)
class Call:
    """What the engine received and returned, recorded independently of the system under test."""

    prompt: list[int]
    ids: list[int]
    logprobs: list[float]
    versions: list[int]
    stop: StopReason


@dataclass(slots=True)
class Plan:
    """One episode: its script, the engine's record of it, and the results of its tool."""

    template: str
    turns: list[Scripted]
    fork_after: int | None = None
    calls: list[Call] = field(default_factory=list)
    tool_texts: list[str] = field(default_factory=list)
    forks: int = 0
    broke: str | None = None


class Engine:
    """Returns the script of each session, and lets other episodes run in between."""

    def __init__(self) -> None:
        self.plans: dict[str, Plan] = {}

    async def generate(
        self, input_ids: Sequence[int], sampling: SamplingParams, *, session_id: str, rid: str
    ) -> GenerateResult:
        plan = self.plans[session_id]
        turn = plan.turns[len(plan.calls)]
        most = sampling.max_new_tokens
        stop = StopReason.LENGTH if len(turn.ids) > most and turn.stop is StopReason.STOP else turn.stop
        columns = turn.ids[:most], turn.logprobs[:most], turn.versions[:most]
        plan.calls.append(Call(list(input_ids), *columns, stop))
        await asyncio.sleep(0)

        ids, logprobs, versions = (list(column) for column in columns)
        if turn.breaks and ids:
            plan.broke = turn.breaks
            if turn.breaks == "nan":
                logprobs[-1] = float("nan")
            elif turn.breaks == "lengths":
                logprobs.pop()
            else:
                plan.calls[-1].stop = stop = StopReason.ABORT
        return GenerateResult(ids, logprobs, versions, stop)


class LookUp(Tool):
    """Returns a random text, which is also recorded in the plan."""

    def __init__(self, chance: Chance) -> None:
        super().__init__({}, SCHEMA)
        self._chance = chance

    async def open(self, task: Task, **create_kwargs: Any) -> Plan:
        plan: Plan = task.extra_info["plan"]
        return plan

    async def execute(self, state: Plan, arguments: dict[str, Any], **execute_kwargs: Any) -> ToolResult:
        text = self._chance.text() * (40 if self._chance.random.random() < 0.05 else 1)
        state.tool_texts.append(text)
        return ToolResult(text)


class Follower(AgentLoop):
    """Follows the script: generates, runs calls or observes the script's messages, and may fork."""

    async def run(self, episode: Episode) -> None:
        plan: Plan = episode.task.extra_info["plan"]
        while len(plan.calls) < len(plan.turns):
            script = plan.turns[len(plan.calls)]
            turn = await episode.generate()

            if plan.fork_after == len(plan.calls) and len(plan.calls) < len(plan.turns):
                plan.forks += 1
                other = episode.fork()
                other.observe(*script.observed)
                await other.generate()
                if len(plan.calls) == len(plan.turns):
                    return

            if episode.tools and turn.tool_calls:
                await episode.call_tools(turn.tool_calls)
            elif episode.tools and turn.malformed_calls:
                episode.answer_malformed(turn)
            else:
                episode.observe(*script.observed)
