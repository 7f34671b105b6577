"""The proof that a chat template keeps the token law, made before a run starts (DESIGN section 3, rules 2, 3 and 6).

Each conversation of the battery is played twice. Once as an episode: `start`, then for every turn the ids that the
template gives it, as if sampled, and what `extend` appends. And once as the template's own rendering of the whole
conversation, encoded in one piece. Three things have to hold after every turn:

1. What `extend` returned is exactly the end of the whole rendering's ids, and there it stands behind the end of the
   turn.
2. What was not sampled stands in the whole rendering, in order, beginning at its start: nothing that the model was
   shown is written in another way later.
3. Control tokens that are spelled in contents are text: replaced by a harmless word, they change no control id.

Where both ways give the same ids throughout, the template is exact. Where they differ inside of sampled turns alone,
because the template drops earlier reasoning or ends the last turn with another token, what was sampled stays, and the
difference is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from agentloop.chat.proof.conversations import TOOLS, Abilities, Conversation, conversations, find_abilities, showcase
from agentloop.chat.renderer import REASONING_OPENINGS, ChatRenderer
from agentloop.errors import ModelError
from agentloop.types import Message


class Verdict(StrEnum):
    """What the battery found of a template."""

    EXACT = "exact"  # the episode's ids are those of the template's own rendering
    KEPT = "exact with sampled turns kept"  # the template writes earlier turns in another way; what was sampled stays
    REFUSED = "refused"  # episodes with this template would break the law


@dataclass(frozen=True, slots=True)
class Difference:
    """A sampled turn, and what the template makes of it once the conversation goes on."""

    sampled: str
    rewritten: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an example: who wrote it, its text and its ids."""

    author: str
    text: str
    ids: list[int]


@dataclass
class Proof:
    """What was tried and what was found.

    Attributes:
        verdict: of all that was tried.
        reason: why it was refused; empty otherwise.
        conversations, turns: how many were played.
        abilities: what the template can render, and in its own words what not.
        differences: the first sampled turns that the template writes in another way later.
        example: one conversation, piece by piece.
    """

    verdict: Verdict
    abilities: Abilities
    reason: str = ""
    conversations: int = 0
    turns: int = 0
    differences: list[Difference] = field(default_factory=list)
    example: list[Piece] = field(default_factory=list)

    def require(self, *, tools: bool = False, users: bool = False, system: bool = False) -> None:
        """Refuse a run that needs what the template cannot do.

        Args:
            tools: the run offers tools, so their results have to follow a turn.
            users: users' messages follow a turn.
            system: prompts begin with a system message.

        Raises:
            ModelError: why, and what to change.
        """
        if self.verdict is Verdict.REFUSED:
            raise ModelError(
                f"the chat template cannot keep the token law: {self.reason}",
                "set model.chat_template to one that passes `agentloop template`",
            )
        needs = {
            "tool results": tools,
            "reading tool calls": tools,
            "users' messages after a turn": users,
            "system messages": system,
        }
        for ability, needed in needs.items():
            if needed and ability in self.abilities.missing:
                reason, _, fix = self.abilities.missing[ability].partition("\n  fix: ")
                raise ModelError(f"the run needs {ability}: {reason}", fix or "use another chat template")


class _Broken(Exception):
    """The battery found a violation; its text is the reason."""


SHOWN_DIFFERENCES = 3


def prove(
    renderer: ChatRenderer, tools: Sequence[dict[str, Any]] | None = None, *, count: int = 200, seed: int = 0
) -> Proof:
    """Try a template on `count` conversations.

    Args:
        tools: the schemas that the run offers; None: those of the battery, where the template takes any.
        count: conversations; 200 take a second or two.
    """
    schemas = list(tools) if tools else TOOLS
    abilities = find_abilities(renderer, schemas)
    if not abilities.results and tools is None:
        schemas = []
        abilities = _merge(find_abilities(renderer, None), abilities)
    proof = Proof(Verdict.EXACT, abilities)
    if not (abilities.users or abilities.results):
        proof.verdict = Verdict.REFUSED
        proof.reason = next(iter(abilities.missing.values()), "nothing can follow a turn")
        return proof
    try:
        proof.example = _play(renderer, showcase(abilities), schemas or None, proof)
        for conversation in conversations(renderer, abilities, count=count, seed=seed):
            _play(renderer, conversation, schemas or None, proof)
            proof.conversations += 1
    except (_Broken, ModelError) as exc:
        proof.verdict, proof.reason = Verdict.REFUSED, str(exc)
    return proof


def _merge(without_tools: Abilities, with_tools: Abilities) -> Abilities:
    missing = {**with_tools.missing, **without_tools.missing}
    for ability in ("users' messages after a turn", "reasoning", "system messages"):
        if ability not in without_tools.missing:
            missing.pop(ability, None)
    return Abilities(
        system=without_tools.system,
        users=without_tools.users,
        results=False,
        calls=False,
        several_calls=False,
        results_then_user=False,
        text_with_calls=False,
        reasoning=without_tools.reasoning,
        missing=missing,
    )


def _play(renderer: ChatRenderer, conversation: Conversation, tools: Any, proof: Proof) -> list[Piece]:
    """Play one conversation both ways; returns it piece by piece.

    Raises:
        _Broken: where they differ outside of sampled turns.
    """
    history: list[Message] = list(conversation.start)
    ids = renderer.start(history, tools)
    whole = renderer.whole(history, tools)
    if ids != whole:
        raise _Broken(f"the first prompt is not the template's own: {_around(renderer, ids, whole)}")
    if conversation.hostile:
        _check_harmless(renderer, lambda messages: renderer.start(messages, tools), history)
    shown, differs = [ids], False
    example = [Piece("prompt", renderer.decode(ids), ids)]
    for exchange in conversation.exchanges:
        sampled = renderer.turn_ids(exchange.turn, cut=exchange.cut)
        stop = "length" if exchange.cut else "stop"
        before = ids + sampled
        added = renderer.extend(before, stop, exchange.follow, tools)
        history += [exchange.turn, *exchange.follow]
        ids = before + added
        whole = renderer.whole(history, tools)
        if exchange.cut:
            # White space that a template puts before its end-of-turn token (" </s>") cannot melt into the turn's last
            # token any more: the text is the template's, the ids are from the end-of-turn token on.
            first = next((i for i, token in enumerate(added) if token in renderer.encoder.ids), 0)
            added = added[first:]
        if whole[-len(added) :] != added:
            raise _Broken(
                "what is appended after a turn is not what the template writes there: "
                f"{_around(renderer, added, whole[-len(added) :])}"
            )
        _check_join(renderer, sampled, whole[: -len(added)], cut=exchange.cut)
        shown.append(added)
        if ids != whole:
            _check_shown(renderer, shown, whole)
            proof.verdict = Verdict.KEPT
            if not differs and len(proof.differences) < SHOWN_DIFFERENCES:
                proof.differences.append(_difference(renderer, ids, whole))
            differs = True
        if conversation.hostile:
            _check_harmless(
                renderer,
                lambda messages, before=before, stop=stop: renderer.extend(before, stop, messages, tools),
                exchange.follow,
            )
        proof.turns += 1
        example += [Piece("model", renderer.decode(sampled), sampled), Piece("template", renderer.decode(added), added)]
    return example


def _check_join(renderer: ChatRenderer, sampled: list[int], rest: list[int], *, cut: bool) -> None:
    """What is appended begins where the sampled turn ends: in the whole rendering the same end stands before it.

    Raises:
        _Broken: something between the two is missing, such as the newline behind the end-of-turn token.
    """
    if cut:
        prompt = renderer.generation_prompt_ids  # all of the turn may be reasoning that the template drops
        joined = (
            not (sampled or prompt)
            or rest[-1] == (sampled or prompt)[-1]
            or renderer.decode(rest).endswith(_header(renderer))
            or _same_end(renderer.decode(rest), renderer.decode(sampled))
        )
    else:
        closers = renderer.closing_ids
        joined = rest[-1] == sampled[-1] or (rest[-1] in closers and sampled[-1] in closers)
    if not joined:
        raise _Broken(
            "what is appended after a turn does not join it: the template writes "
            f"{renderer.decode(rest[-8:])!r} where the turn ends in {renderer.decode(sampled[-8:])!r}"
        )


def _header(renderer: ChatRenderer) -> str:
    """What opens the model's turn, without the reasoning that the generation prompt may open inside of it."""
    text = renderer.decode(renderer.generation_prompt_ids)
    opening = next((tag for tag in REASONING_OPENINGS if text.rstrip().endswith(tag)), None)
    return text[: text.rindex(opening)] if opening else text


def _same_end(one: str, two: str) -> bool:
    """White space aside: a template may trim it, or put some before its end-of-turn token."""
    return one.rstrip().endswith(two.rstrip()[-8:].lstrip())


def _check_shown(renderer: ChatRenderer, shown: Sequence[list[int]], whole: list[int]) -> None:
    """Everything that was not sampled stands in the whole rendering, in order.

    Raises:
        _Broken: the first piece that does not.
    """
    prompt = renderer.generation_prompt_ids
    position = 0
    for number, piece in enumerate(shown):
        body = piece[: -len(prompt)] if prompt and piece[-len(prompt) :] == prompt else piece
        if number == 0:
            found = 0 if whole[: len(body)] == body else -1
        elif number == len(shown) - 1:
            found = len(whole) - len(piece)  # its place was checked: it is the end
        else:
            found = _find(whole, body, position)
        if found < position:
            raise _Broken(
                f"the template writes in another way later what the model was shown: {renderer.decode(body)!r}"
            )
        position = found + len(body)


def _find(ids: list[int], piece: list[int], start: int) -> int:
    if not piece:
        return start
    first = piece[0]
    for position in range(start, len(ids) - len(piece) + 1):
        if ids[position] == first and ids[position : position + len(piece)] == piece:
            return position
    return -1


def _check_harmless(renderer: ChatRenderer, render: Any, messages: Sequence[Message]) -> None:
    """Spelled control tokens in contents change no control id.

    Raises:
        _Broken: they do.
    """
    calm: list[Message] = [{**message, "content": "harmless"} for message in messages]
    controls = renderer.encoder.ids
    hostile_ids, calm_ids = ([token for token in render(each) if token in controls] for each in (messages, calm))
    if hostile_ids != calm_ids:
        raise _Broken(
            f"control tokens in a content become control tokens: {renderer.decode(hostile_ids)!r} instead of "
            f"{renderer.decode(calm_ids)!r}"
        )


def _around(renderer: ChatRenderer, one: list[int], two: list[int]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    begin = max(at - 4, 0)
    return f"{renderer.decode(one[begin : at + 8])!r} instead of {renderer.decode(two[begin : at + 8])!r}"


def _difference(renderer: ChatRenderer, ids: list[int], whole: list[int]) -> Difference:
    """Where two sequences differ first, up to the end of that turn."""
    begin = next((i for i, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), min(len(ids), len(whole)))
    low = max(begin - 6, 0)
    sampled, rewritten = (renderer.decode(side[low : begin + 120]) for side in (ids, whole))
    return Difference(_clip(sampled), _clip(rewritten))


def _clip(text: str, size: int = 160) -> str:
    return text if len(text) <= size else f"{text[:size]}…"
