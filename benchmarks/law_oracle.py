"""Check the token law from outside: compare the engine's record with the trajectories.

Nothing here uses the ledger, the renderer or the library's own checks. The meaning of a template is
found by rendering whole conversations with it, and by comparing text and ids with those in the
trajectory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from law_material import SCHEMA, Plan

from agentloop.types import EpisodeStatus, Message, Trajectory

QUESTION, SAID, KEY = "ORACLE-QUESTION", "ORACLE-ANSWER", "ORACLE-KEY"
NAME = str(SCHEMA["function"]["name"])
SHAPES: tuple[tuple[str, ...], ...] = (("user",), ("tool",), ("tool", "tool"), ("user", "user"), ("tool", "user"))


class Violation(Exception):
    """The token law is broken; names the rule and the place."""

    def __init__(self, rule: int, text: str) -> None:
        super().__init__(f"rule {rule}: {text}")
        self.rule, self.text = rule, text


def need(rule: int, holds: object, text: str) -> None:
    """Raise `Violation` unless `holds`."""
    if not holds:
        raise Violation(rule, text)


class TemplateOracle:
    """The meaning of one chat template, found by rendering whole conversations.

    Attributes:
        shapes: roles of observed messages that the template accepts after an assistant's turn.
        call_text: a tool call as the template writes it, its end included; None if it has none.
        closing: ids that end a turn; empty if the model stops at the token that opens the next one
            (GLM).
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
        """Return `text` in the tokenizer's own normal form; Python's Unicode tables are of another
        version.
        """
        normalizer = self._backend.normalizer
        return str(normalizer.normalize_str(text)) if normalizer else text

    def controls_in(self, ids: Sequence[int]) -> list[int]:
        controls = self._controls
        return [token for token in ids if token in controls]

    def check_between(self, last: int, between: list[int], new: list[Message], thorough: bool) -> None:
        """Check the ids between a sampled turn and the next one.

        Args:
            last: the last id of the turn; -1 if it has none.
            between: the ids between the turns.
            new: the messages observed there.
            thorough: compare text and ids, not only control tokens.
        """
        roles = tuple(message["role"] for message in new)
        end = self._ends["called" if roles[0] == "tool" else "said"]

        skeleton = self._skeletons.get(roles)
        if skeleton is None:
            neutral: list[Message] = [observed(role, "neutral") for role in roles]
            skeleton = self._skeletons[roles] = self.controls_in(self.encode(self._tail(neutral)))

        if end is not None and last in self.closing:
            between = [end, *between]  # any closing token takes the place of the template's own
        elif end is None and last == skeleton[0]:
            between = [last, *between]  # the model ended the turn by opening the next
        need(3, self.controls_in(between) == skeleton, f"{self.name}: control tokens after a turn, for {roles}")
        if thorough:
            self._compare(between, self._tail(new), new)

    def check_start(self, prompt: list[int], messages: list[Message], tools: list[dict[str, Any]] | None) -> None:
        """Check the first prompt against the template's own rendering."""
        neutral: list[Message] = [{**message, "content": "neutral"} for message in messages]
        key = (tuple(message["role"] for message in messages), bool(tools))
        if key not in self._skeletons:
            self._skeletons[key] = self.controls_in(self.encode(self._render(neutral, tools)))

        need(3, self.controls_in(prompt) == self._skeletons[key], f"{self.name}: control tokens of the first prompt")
        self._compare(prompt, self._render(messages, tools), messages)

    def _compare(self, ids: list[int], text: str, messages: list[Message]) -> None:
        """Compare the text; and the ids, unless a content spells a control token, which `encode`
        would convert.
        """
        self.checked += 1
        seen = self.decode(ids)
        # In normal form: a combining character after a control token joins its last letter, but
        # only in text.
        need(3, self.normalized(seen) == self.normalized(text), f"{self.name}: the text is {seen!r}, not {text!r}")
        contents = [str(message["content"]) for message in messages]
        if not any(spelling in content for content in contents for spelling in self._spelling):
            need(3, ids == self.encode(text), f"{self.name}: {text!r} has other ids")

    def _tail(self, new: list[Message]) -> str:
        """Return the template's text from the end of an answer on, in a conversation with `new`
        after it.
        """
        called = new[0]["role"] == "tool"
        # gpt-oss writes the name of the call beside the result; a malformed call's has a name of its own.
        text = self._render([_user(QUESTION), self._answer(called, str(new[0].get("name", NAME))), *new])
        words = KEY if called and self.call_text else SAID
        place = text.index(words) + len(words)

        end = self._ends["called" if called else "said"]
        if end is not None:
            return text[text.index(self._tokenizer.convert_ids_to_tokens(end), place) :]
        if called and self.call_text:  # skip the rest of the call itself
            rest = self.call_text[self.call_text.index(KEY) + len(KEY) :]
            assert text.startswith(rest, place)
            place += len(rest)
        return text[place:]

    def _answer(self, called: bool, name: str = NAME) -> Message:
        message: Message = {"role": "assistant", "content": SAID}
        if called:
            call: Any = {
                "type": "function",
                "id": "call00000",
                "function": {"name": name, "arguments": {"key": KEY}},
            }
            message["tool_calls"] = [call]
        return message

    def _find_final(self) -> int | None:
        """Return the token that ends the last answer of a conversation; gpt-oss has a special one
        (`<|return|>`).
        """
        text = self._render([_user(QUESTION), self._answer(False)], generate=False)
        rest = text[text.index(SAID) + len(SAID) :].lstrip()
        found = [spelling for spelling in self._spelling if rest.startswith(spelling)]
        return self._spelling[max(found, key=len)] if found else None

    def _find_call(self) -> str | None:
        """Return a call as the template writes it, up to the control token that ends it; None if it
        has none.
        """
        try:
            before = self._render([_user(QUESTION)], [SCHEMA])
            whole = self._render([_user(QUESTION), {**self._answer(True), "content": ""}], [SCHEMA], generate=False)
        except Refused:
            return None

        # The call is what the rendering adds to the prompt.
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
    """Return a message that follows a turn without a call. A tool result has a name: some templates
    write it.
    """
    message: dict[str, Any] = {"role": role, "content": content}
    if role == "tool":
        message |= {"name": NAME, "made_up": True}
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
    """Check one episode; return the number of turns that were compared.

    Args:
        sample: for each turn, whether the text and ids around it are compared too.

    Raises:
        Violation: the first violation found.
    """
    # How the episode ended.
    need(4, len(trajectories) >= 1, "an episode came back without a trajectory")
    status, error = trajectories[-1].status, trajectories[-1].error or ""
    wanted = EpisodeStatus.REJECTED if plan.broke in ("nan", "lengths") else EpisodeStatus.FAILED
    wanted = wanted if plan.broke else EpisodeStatus.OK
    need(5, status is wanted, f"after {plan.broke or 'a sound engine'} the episode is {status.value}: {error}")
    need(5, (status is EpisodeStatus.OK) == (not error), "a failed episode lacks a reason, or a good one has one")
    need(
        5,
        (trajectories[-1].reward is None) == (status is not EpisodeStatus.OK),
        "a failed episode has a reward, or a good one has none",
    )

    # How many turns and trajectories there are.
    given = len(plan.calls) - (plan.broke == "lengths")  # that answer was never recorded
    held = sum(len(trajectory.turns) for trajectory in trajectories)
    need(4, held == given, f"the engine returned {given} turns, but the trajectories hold {held}")
    need(4, trajectories[-1].metrics["forks"] == plan.forks, "forks were not counted")
    need(4, len(trajectories) <= 1 + plan.forks, f"{len(trajectories)} trajectories of {plan.forks} forks")

    # What the trajectories hold.
    turns_of = _match(plan, trajectories)
    for trajectory, numbers in zip(trajectories, turns_of, strict=True):
        _check_columns(plan, trajectory, numbers)
        _check_text(plan, trajectory, numbers, oracle, sample)
    if len(trajectories) == 2:
        fork, main = trajectories
        assert plan.fork_after is not None
        past = main.turns[plan.fork_after - 1].end
        need(4, fork.token_ids[:past] == main.token_ids[:past], "a fork has a different past than its origin")
    if plan.calls and sample[0]:
        oracle.check_start(plan.calls[0].prompt, prompt, tools)
    return given


def _match(plan: Plan, trajectories: list[Trajectory]) -> list[list[int]]:
    """Return the numbers of the engine's turns, by trajectory. A fork has one turn, after the one
    it forked at.
    """
    everything = list(range(len(plan.calls) - (plan.broke == "lengths")))
    if len(trajectories) == 1:
        if plan.forks and plan.fork_after is not None and not trajectories[0].turns:
            return [[]]
        return [everything]
    assert plan.fork_after is not None
    return [[plan.fork_after], [number for number in everything if number != plan.fork_after]]


def _check_columns(plan: Plan, trajectory: Trajectory, numbers: list[int]) -> None:
    """Check rules 1, 2, 4 and 5 on one trajectory."""
    ids, mask, logprobs, versions = (
        trajectory.token_ids,
        trajectory.loss_mask,
        trajectory.logprobs,
        trajectory.versions,
    )

    lengths = {len(ids), len(mask), len(logprobs), len(versions)}
    need(5, len(lengths) == 1, f"the columns have the lengths {sorted(lengths)}")
    need(4, len(numbers) == len(trajectory.turns), "a turn is missing from the trajectories, or in two of them")

    at = 0
    for number, turn in zip(numbers, trajectory.turns, strict=True):
        call = plan.calls[number]
        start, end = turn.start, turn.start + len(call.ids)
        need(
            2, ids[:start] == call.prompt, f"turn {number} was sampled from a different prompt than the trajectory has"
        )
        need(1, ids[start:end] == call.ids and turn.end == end, f"turn {number} holds different ids than were sampled")
        need(1, mask[start:end] == [1] * len(call.ids), f"turn {number} is not all masked in")
        if plan.broke != "nan":
            need(
                1,
                logprobs[start:end] == call.logprobs,
                f"turn {number} has different logprobs than the engine returned",
            )
        need(
            1,
            versions[start:end] == call.versions,
            f"turn {number} has different policy versions than the engine returned",
        )
        need(1, turn.stop_reason is call.stop, f"turn {number} has a different stop reason")
        _check_unsampled(trajectory, at, start)
        at = end

    unanswered = plan.broke == "lengths" and ids == plan.calls[-1].prompt
    need(2, at == len(ids) or unanswered, "there are ids after the last sampled turn")


def _check_unsampled(trajectory: Trajectory, begin: int, end: int) -> None:
    """Check that nothing between turns is trained; in a fork, nothing of its past."""
    gap = end - begin
    columns = trajectory.loss_mask[begin:end], trajectory.logprobs[begin:end], trajectory.versions[begin:end]
    rule = 1 if begin else 4
    need(rule, columns[0] == [0] * gap, f"a token that was not sampled here is trained, between {begin} and {end}")
    need(rule, columns[1] == columns[2] == [None] * gap, "a token that was not sampled here has a logprob or version")


def _check_text(
    plan: Plan, trajectory: Trajectory, numbers: list[int], oracle: TemplateOracle, sample: Sequence[bool]
) -> None:
    """Check rule 3: between turns is what the template writes for the observed messages."""
    spoken = [i for i, message in enumerate(trajectory.messages) if message["role"] == "assistant"]
    own = spoken[len(spoken) - len(numbers) :]  # a fork's messages include its past

    pairs = zip(numbers, trajectory.turns, trajectory.turns[1:], own, own[1:], strict=False)
    for number, earlier, later, position, following in pairs:
        new = trajectory.messages[position + 1 : following]
        last = plan.calls[number].ids[-1] if plan.calls[number].ids else -1
        oracle.check_between(last, trajectory.token_ids[earlier.end : later.start], new, sample[number])

    # Tool results arrive whole, or cut with a note.
    tools = iter(plan.tool_texts)
    for message in trajectory.messages if plan.forks == 0 else ():
        if message.get("name") == NAME and "made_up" not in message:
            returned, shown = next(tools), str(message["content"])
            kept, cut, _ = shown.partition("\n[cut: the first ")
            whole = shown == returned
            need(3, whole or (cut and oracle.normalized(returned).startswith(kept)), "a tool result was changed")
