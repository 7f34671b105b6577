"""The token law, checked from outside: what the engine saw and gave against what the trajectories hold.

Nothing here asks the ledger, the renderer or `Trajectory.check`. What the template means is found by rendering whole
conversations with it, and comparing text and ids with what stands in the trajectory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from law_material import SCHEMA, Plan

from agentloop.types import EpisodeStatus, Message, Trajectory

QUESTION, SAID, KEY = "ORACLE-QUESTION", "ORACLE-ANSWER", "ORACLE-KEY"
SHAPES: tuple[tuple[str, ...], ...] = (("user",), ("tool",), ("tool", "tool"), ("user", "user"), ("tool", "user"))


class Violation(Exception):
    """The law is broken: which rule, and where."""

    def __init__(self, rule: int, text: str) -> None:
        super().__init__(f"rule {rule}: {text}")
        self.rule, self.text = rule, text


def need(rule: int, holds: object, text: str) -> None:
    if not holds:
        raise Violation(rule, text)


class TemplateOracle:
    """What one chat template means, found by rendering whole conversations.

    Attributes:
        shapes: roles of observed messages that the template takes after an assistant's turn.
        call_text: how the template writes a tool call, its end included; None when it has none.
        closing: ids that end a turn; none where the next turn's opening token is what the model stops at (GLM).
    """

    def __init__(self, name: str, tokenizer: Any, template: str, end_of_turn: int | None) -> None:
        self.name = name
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._template = template
        self._spelling = {
            token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.content.strip()
        }
        self._controls = set(self._spelling.values())
        self._skeletons: dict[Any, list[int]] = {}
        self._ends: dict[str, int | None] = {"said": end_of_turn, "called": end_of_turn}
        self._final = self._find_final() if end_of_turn is not None else None
        self.call_text = self._find_call()
        self.shapes = tuple(shape for shape in SHAPES if self._takes(shape))
        self.checked = 0

    @property
    def closing(self) -> set[int]:
        return {end for end in (*self._ends.values(), self._final) if end is not None}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def normalized(self, text: str) -> str:
        """`text` in the tokenizer's own normal form; the Unicode tables of Python are of another year."""
        normalizer = self._backend.normalizer
        return str(normalizer.normalize_str(text)) if normalizer else text

    def controls_in(self, ids: Sequence[int]) -> list[int]:
        controls = self._controls
        return [token for token in ids if token in controls]

    def check_between(self, last: int, between: list[int], new: list[Message], thorough: bool) -> None:
        """Check the ids between a sampled turn, whose last id is `last` (-1: it has none), and the next turn."""
        roles = tuple(message["role"] for message in new)
        end = self._ends["called" if roles[0] == "tool" else "said"]
        skeleton = self._skeletons.get(roles)
        if skeleton is None:
            neutral: list[Message] = [observed(role, "neutral") for role in roles]
            skeleton = self._skeletons[roles] = self.controls_in(self.encode(self._tail(neutral)))
        if end is not None and last in self.closing:
            between = [end, *between]  # whichever of them was sampled, it stands for the template's own
        elif end is None and last == skeleton[0]:
            between = [last, *between]  # the turn was ended by opening the one that follows
        need(3, self.controls_in(between) == skeleton, f"{self.name}: control tokens after a turn, for {roles}")
        if thorough:
            self._compare(between, self._tail(new), new)

    def check_start(self, prompt: list[int], messages: list[Message], tools: list[dict[str, Any]] | None) -> None:
        """Check the first prompt against the template's rendering of its messages."""
        neutral: list[Message] = [{**message, "content": "neutral"} for message in messages]
        key = (tuple(message["role"] for message in messages), bool(tools))
        if key not in self._skeletons:
            self._skeletons[key] = self.controls_in(self.encode(self._render(neutral, tools)))
        need(3, self.controls_in(prompt) == self._skeletons[key], f"{self.name}: control tokens of the first prompt")
        self._compare(prompt, self._render(messages, tools), messages)

    def _compare(self, ids: list[int], text: str, messages: list[Message]) -> None:
        """Text always; ids where no content spells a control token, which plain encoding would make one of."""
        self.checked += 1
        seen = self.decode(ids)
        # Both in the normal form: a combining character behind a control token joins its last letter in text alone.
        need(3, self.normalized(seen) == self.normalized(text), f"{self.name}: the text is {seen!r}, not {text!r}")
        contents = [str(message["content"]) for message in messages]
        if not any(spelling in content for content in contents for spelling in self._spelling):
            need(3, ids == self.encode(text), f"{self.name}: {text!r} has other ids")

    def _tail(self, new: list[Message]) -> str:
        """The template's text from the end of an answer on, in a whole conversation with `new` after it."""
        called = new[0]["role"] == "tool"
        text = self._render([_user(QUESTION), self._answer(called), *new])
        words = KEY if called and self.call_text else SAID
        place = text.index(words) + len(words)
        end = self._ends["called" if called else "said"]
        if end is not None:
            return text[text.index(self._tokenizer.convert_ids_to_tokens(end), place) :]
        if called and self.call_text:  # behind the call's own last words
            rest = self.call_text[self.call_text.index(KEY) + len(KEY) :]
            assert text.startswith(rest, place)
            place += len(rest)
        return text[place:]

    def _answer(self, called: bool) -> Message:
        message: Message = {"role": "assistant", "content": SAID}
        if called:
            call: Any = {
                "type": "function",
                "id": "call00000",
                "function": {"name": "look_up", "arguments": {"key": KEY}},
            }
            message["tool_calls"] = [call]
        return message

    def _find_final(self) -> int | None:
        """What ends the answer when nothing follows it; gpt-oss has a token of its own for that (`<|return|>`)."""
        text = self._render([_user(QUESTION), self._answer(False)], generate=False)
        rest = text[text.index(SAID) + len(SAID) :].lstrip()
        found = [spelling for spelling in self._spelling if rest.startswith(spelling)]
        return self._spelling[max(found, key=len)] if found else None

    def _find_call(self) -> str | None:
        """How the template writes a call, up to the control token that ends it; found by rendering one."""
        try:
            before = self._render([_user(QUESTION)], [SCHEMA])
            whole = self._render([_user(QUESTION), {**self._answer(True), "content": ""}], [SCHEMA], generate=False)
        except Refused:
            return None
        start = before.index(QUESTION) + len(QUESTION)
        common = start
        while common < min(len(before), len(whole)) and before[common] == whole[common]:
            common += 1
        text = whole[common:].rstrip()
        if common != len(before) or KEY not in text:
            return None
        if self._ends["said"] is None:
            return text
        ends = [spelling for spelling in self._spelling if text.endswith(spelling)]
        if not ends:
            return None
        self._ends["called"] = self._spelling[max(ends, key=len)]
        return text

    def _takes(self, shape: tuple[str, ...]) -> bool:
        try:
            tail = self._tail([observed(role, f"CONTENT-{i}-") for i, role in enumerate(shape)])
        except (Refused, ValueError):
            return False
        return all(f"CONTENT-{i}-" in tail for i in range(len(shape)))

    def _render(self, messages: list[Message], tools: Any = None, generate: bool = True) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    chat_template=self._template,
                    add_generation_prompt=generate,
                    tokenize=False,
                )
            )
        except Exception as exc:
            raise Refused(f"{type(exc).__name__}: {exc}") from exc


class Refused(Exception):
    """The template raised."""


def observed(role: str, content: str) -> Message:
    """A message that follows a turn without a call; a tool's tells its name, which some templates write."""
    message: dict[str, Any] = {"role": role, "content": content}
    if role == "tool":
        message |= {"name": "look_up", "made_up": True}
    return cast("Message", message)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def check_episode(
    plan: Plan,
    trajectories: list[Trajectory],
    oracle: TemplateOracle,
    prompt: list[Message],
    tools: Any,
    sample: Sequence[bool],
) -> int:
    """Check one episode; returns the turns that were compared.

    Args:
        sample: one entry a turn: whether its neighbourhood is rendered again and compared in text and ids.

    Raises:
        Violation: naming the rule and what is wrong.
    """
    need(4, len(trajectories) >= 1, "an episode came back without a trajectory")
    status, error = trajectories[-1].status, trajectories[-1].error or ""
    wanted = EpisodeStatus.REJECTED if plan.broke in ("nan", "lengths") else EpisodeStatus.FAILED
    wanted = wanted if plan.broke else EpisodeStatus.OK
    need(5, status is wanted, f"after {plan.broke or 'a sound engine'} the episode is {status.value}: {error}")
    need(5, (status is EpisodeStatus.OK) == (not error), "a bad episode has a reason and a good one has none")
    need(5, (trajectories[-1].reward is None) == (status is not EpisodeStatus.OK), "only a good episode has a reward")
    given = len(plan.calls) - (plan.broke == "lengths")  # that answer was never written
    held = sum(len(trajectory.turns) for trajectory in trajectories)
    need(4, held == given, f"the engine gave {given} turns, the trajectories hold {held}")
    need(4, trajectories[-1].metrics["forks"] == plan.forks, "the forks are not counted")
    need(4, len(trajectories) <= 1 + plan.forks, f"{len(trajectories)} trajectories of {plan.forks} forks")
    turns_of = _match(plan, trajectories)
    for trajectory, numbers in zip(trajectories, turns_of, strict=True):
        _check_columns(plan, trajectory, numbers)
        _check_text(plan, trajectory, numbers, oracle, sample)
    if len(trajectories) == 2:
        fork, main = trajectories
        assert plan.fork_after is not None
        past = main.turns[plan.fork_after - 1].end
        need(4, fork.token_ids[:past] == main.token_ids[:past], "a fork has another past than what it forked from")
    if plan.calls and sample[0]:
        oracle.check_start(plan.calls[0].prompt, prompt, tools)
    return given


def _match(plan: Plan, trajectories: list[Trajectory]) -> list[list[int]]:
    """Which of the engine's turns belong to which trajectory: a fork's single turn follows the one it forked at."""
    everything = list(range(len(plan.calls) - (plan.broke == "lengths")))
    if len(trajectories) == 1:
        if plan.forks and plan.fork_after is not None and not trajectories[0].turns:
            return [[]]
        return [everything]
    assert plan.fork_after is not None
    return [[plan.fork_after], [number for number in everything if number != plan.fork_after]]


def _check_columns(plan: Plan, trajectory: Trajectory, numbers: list[int]) -> None:
    """Rules 1, 2, 4 and 5 on one trajectory."""
    ids, mask, logprobs, versions = (
        trajectory.token_ids,
        trajectory.loss_mask,
        trajectory.logprobs,
        trajectory.versions,
    )
    lengths = {len(ids), len(mask), len(logprobs), len(versions)}
    need(5, len(lengths) == 1, f"the columns have the lengths {sorted(lengths)}")
    need(4, len(numbers) == len(trajectory.turns), "a turn is in no trajectory, or in two")
    at = 0
    for number, turn in zip(numbers, trajectory.turns, strict=True):
        call = plan.calls[number]
        start, end = turn.start, turn.start + len(call.ids)
        need(2, ids[:start] == call.prompt, f"turn {number} was sampled from another prompt than the trajectory has")
        need(1, ids[start:end] == call.ids and turn.end == end, f"turn {number} holds other ids than were sampled")
        need(1, mask[start:end] == [1] * len(call.ids), f"turn {number} is not all masked in")
        if plan.broke != "nan":
            need(1, logprobs[start:end] == call.logprobs, f"turn {number} has other logprobs than were given")
        need(1, versions[start:end] == call.versions, f"turn {number} has other policy versions than were given")
        need(1, turn.stop_reason is call.stop, f"turn {number} stopped for another reason")
        _check_unsampled(trajectory, at, start)
        at = end
    unanswered = plan.broke == "lengths" and ids == plan.calls[-1].prompt
    need(2, at == len(ids) or unanswered, "something stands behind the last sampled turn")


def _check_unsampled(trajectory: Trajectory, begin: int, end: int) -> None:
    """Nothing between turns trains; in a fork, nothing of its past does."""
    gap = end - begin
    columns = trajectory.loss_mask[begin:end], trajectory.logprobs[begin:end], trajectory.versions[begin:end]
    rule = 1 if begin else 4
    need(rule, columns[0] == [0] * gap, f"a token that was not sampled here trains, between {begin} and {end}")
    need(rule, columns[1] == columns[2] == [None] * gap, "a token that was not sampled here has a logprob or version")


def _check_text(
    plan: Plan, trajectory: Trajectory, numbers: list[int], oracle: TemplateOracle, sample: Sequence[bool]
) -> None:
    """Rule 3: what stands between the turns is what the template writes for the messages observed there."""
    spoken = [i for i, message in enumerate(trajectory.messages) if message["role"] == "assistant"]
    own = spoken[len(spoken) - len(numbers) :]  # a fork's messages begin with its past
    pairs = zip(numbers, trajectory.turns, trajectory.turns[1:], own, own[1:], strict=False)
    for number, earlier, later, position, following in pairs:
        new = trajectory.messages[position + 1 : following]
        last = plan.calls[number].ids[-1] if plan.calls[number].ids else -1
        oracle.check_between(last, trajectory.token_ids[earlier.end : later.start], new, sample[number])
    tools = iter(plan.tool_texts)
    for message in trajectory.messages if plan.forks == 0 else ():
        if message.get("name") == "look_up" and "made_up" not in message:
            returned, told = next(tools), str(message["content"])
            kept, cut, _ = told.partition("\n[cut: the first ")
            whole = told == returned
            need(3, whole or (cut and oracle.normalized(returned).startswith(kept)), "a tool's result changed")
