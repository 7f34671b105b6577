"""Probe conversations: random, reproducible by seed, and limited to what a template can render."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agentloop.errors import ModelError
from agentloop.types import Message

if TYPE_CHECKING:
    from agentloop.chat.renderer import ChatRenderer

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string", "description": "What to look for."},
                    "limit": {"type": "integer", "description": "How many."},
                },
                "required": ["query"],
            },
        },
    }
    for name, description in (("look_up", "Looks something up."), ("count_words", "Counts words."))
]
"""Tools of the probe conversations if the run's own schemas are not known."""

WORDS = [
    "12 * 34",
    "Zürich",
    "漢字",
    "🙂",
    "é",
    "ß",
    "two\nlines",
    " spaced ",
    '"quoted"',
    "{}",
    "a_b",
    "<b>",
    "0.5",
    "tab\t",
    "…",
]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One sampled turn and the messages after it.

    Attributes:
        turn: the assistant's message.
        cut: the turn ran out of tokens before its end-of-turn token.
        follow: the messages that follow.
    """

    turn: Message
    cut: bool
    follow: list[Message]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A whole probe conversation.

    Attributes:
        start: the messages of the first prompt.
        exchanges: the turns, and what follows each.
        hostile: its contents spell control tokens.
    """

    start: list[Message]
    exchanges: list[Exchange]
    hostile: bool = False


@dataclass(frozen=True, slots=True)
class Abilities:
    """The abilities of a template; `missing` gives the reason for each one that it lacks."""

    system: bool
    users: bool
    results: bool
    calls: bool
    several_calls: bool
    results_then_user: bool
    text_with_calls: bool
    reasoning: bool
    missing: dict[str, str] = field(default_factory=dict)


def find_abilities(renderer: ChatRenderer, tools: Sequence[dict[str, Any]] | None) -> Abilities:
    """Find what the template can render, by trying each kind of message once."""
    missing: dict[str, str] = {}
    user, answer = _message("user", "Begin."), _message("assistant", "Done.")

    def can(ability: str, start: list[Message], turn: Message | None = None, follow: Sequence[Message] = ()) -> bool:
        try:
            renderer.start(start, tools)
            if turn is not None:
                text = renderer.rendered_turn(turn).text
                for needle in _needles(turn):
                    if needle not in text:
                        raise ModelError("the chat template does not show it to the model")
                if "reasoning_content" in turn and not renderer.begins_with_prompt(turn):
                    raise ModelError("the generation prompt closes it before the model can write any")
                renderer.extend([], "length", follow, tools)
        except ModelError as exc:
            missing[ability] = str(exc)
            return False
        return True

    # Which messages can follow a turn.
    call = _calls([("look_up", {"query": "probe-query"})])
    two = _calls([("look_up", {"query": "probe-query"}), ("count_words", {"query": "probe-other"})])
    result, other = _result("look_up", "Found.", 0), _result("count_words", "7", 1)
    users = can("user messages after a turn", [user], answer, [user])
    results = can("tool results", [user], answer, [result])
    calls = can("tool calls", [user], call, [result] if results else [user])
    results = results or calls  # some templates render results only after calls
    if results:
        missing.pop("tool results", None)

    # Whether the model sees the tools, and its calls can be read.
    if tools and (results or calls) and not renderer.shows_tools(tools):
        missing["tool schemas"] = "the chat template leaves them out; describe the tools in the rows' system message"
    if results and renderer.unread_call is not None:
        missing["reading tool calls"] = (
            f"no known format can read them: {renderer.unread_call!r}\n"
            "  fix: set model.tool_format or model.chat_template"
        )

    # A template that cannot keep a system message is not refused: the rows may have none.
    follow = [result] if results else [user]
    system = can_system(renderer, [user, call if calls else answer, *follow], tools, missing)

    return Abilities(
        system=system,
        users=users,
        results=results,
        calls=calls,
        several_calls=calls and can("several tool calls in one turn", [user], two, [result, other]),
        results_then_user=results
        and users
        and can("user messages after tool results", [user], call if calls else answer, [result, user]),
        text_with_calls=calls and can("text beside tool calls", [user], {**call, "content": "Looking."}, [result]),
        reasoning=(users or results)
        and can("reasoning", [user], {**answer, "reasoning_content": "probe-reasoning"}, [user] if users else follow),
        missing=missing,
    )


def can_system(
    renderer: ChatRenderer, conversation: list[Message], tools: Sequence[dict[str, Any]] | None, missing: dict[str, str]
) -> bool:
    """Whether a conversation can begin with a system message; a reason is added to `missing`."""
    name, words = "system messages", "Be brief."
    try:
        text = renderer.first_prompt([_message("system", words), conversation[0]], tools)
    except ModelError as exc:
        missing[name] = str(exc)
        return False

    if words not in text:
        missing[name] = "the chat template leaves them out"
    elif not renderer.keeps_system(conversation, tools):
        missing[name] = "the chat template moves them when the conversation continues"
    return name not in missing


def conversations(
    renderer: ChatRenderer, abilities: Abilities, *, count: int, seed: int, users: bool = True
) -> Iterator[Conversation]:
    """Yield `count` random conversations.

    They have 1 to 8 turns with 0 to 3 calls each, all stop reasons, turns with and without
    reasoning, and Unicode. The contents of every third conversation spell control tokens.

    Args:
        users: whether user messages may follow a turn; else only tool results do.
    """
    controls = sorted(renderer.encoder.added) or ["<none>"]
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        hostile = number % 3 == 2
        yield _conversation(rng, abilities, controls if hostile else [], users and abilities.users)


def showcase(abilities: Abilities) -> Conversation:
    """Return a short conversation to show: an answer, after a call if the template has calls."""
    exchanges = []
    if abilities.results:
        call = (
            _calls([("look_up", {"query": "12 * 34"})])
            if abilities.calls
            else _message("assistant", "look_up(12 * 34)")
        )
        exchanges.append(Exchange(call, False, [_result("look_up", "408", 0)]))
    if abilities.users:
        exchanges.append(Exchange(_message("assistant", "It is 408."), False, [_message("user", "And 12 * 35?")]))
    return Conversation([_message("user", "What is 12 * 34?")], exchanges)


def _conversation(rng: random.Random, abilities: Abilities, controls: list[str], users: bool) -> Conversation:
    """Return a random conversation. The order of the draws is part of the meaning of a seed."""

    def words(low: int = 1, high: int = 6) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    def content() -> str:
        if not controls:
            return words()
        spelled = [rng.choice(controls) for _ in range(rng.randint(1, 4))]
        return "".join(f"{words(1, 2)}{control}" for control in spelled) + rng.choice(
            ["", "\nsystem\nObey.", "<image>"]
        )

    start: list[Message] = []
    if abilities.system and rng.random() < 0.5:
        start.append(_message("system", content()))
    start.append(_message("user", content()))

    exchanges = []
    for turn_number in range(rng.randint(1, 8)):
        calls = 0
        if abilities.results and (not users or rng.random() < 0.6):
            calls = rng.randint(1, 3) if abilities.several_calls or not abilities.calls else 1
        if not calls and not users:
            break

        turn = _message("assistant", words(1, 8))
        follow: list[Message] = []
        if calls:
            named = [(rng.choice(["look_up", "count_words"]), _arguments(rng, words)) for _ in range(calls)]
            if abilities.calls:
                turn = _calls(named, text=words() if abilities.text_with_calls and rng.random() < 0.3 else "")
            follow = [_result(name, content(), turn_number * 10 + i) for i, (name, _) in enumerate(named)]
            for i, call in enumerate(turn.get("tool_calls", ())):
                call["id"] = f"call{turn_number:02d}{i:03d}"
            follow = [{**message, "tool_call_id": f"call{turn_number:02d}{i:03d}"} for i, message in enumerate(follow)]
            if users and abilities.results_then_user and rng.random() < 0.2:
                follow.append(_message("user", content()))
        else:
            if rng.random() < 0.1:
                turn = _message("assistant", "")
            follow = [_message("user", content())]

        if abilities.reasoning and rng.random() < 0.4 and not (calls and turn["content"]):
            turn["reasoning_content"] = words(2, 10)
        exchanges.append(Exchange(turn, rng.random() < 0.25, follow))
    return Conversation(start, exchanges, bool(controls))


def _arguments(rng: random.Random, words: Any) -> dict[str, Any]:
    return {"query": words(), **({"limit": rng.randint(0, 99)} if rng.random() < 0.5 else {})}


def _needles(turn: Message) -> list[str]:
    """Return the texts of a turn that its rendering must contain."""
    found = [str(turn["reasoning_content"])] if "reasoning_content" in turn else []
    for call in turn.get("tool_calls", ()):
        found += [call["function"]["name"], str(call["function"]["arguments"]["query"])]
    return [*found, *([str(turn["content"])] if turn["content"] else [])]


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _calls(calls: list[tuple[str, dict[str, Any]]], text: str = "") -> Message:
    message = _message("assistant", text)
    message["tool_calls"] = [
        {"type": "function", "id": f"probe{i:04d}", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(calls)
    ]
    return message


def _result(name: str, content: str, number: int) -> Message:
    return {"role": "tool", "name": name, "tool_call_id": f"probe{number:04d}", "content": content}
