"""Prove, before a run starts, that a chat template keeps the token law (rules 2, 3 and 6).

Each probe conversation is played twice: once as an episode, with `start`, the template's ids of
each turn as if they had been sampled, and `extend`; and once as the template's own rendering of the
whole conversation, encoded in one piece. After every turn, three conditions must hold:

1. The ids that `extend` returned are exactly the end of the whole rendering's ids, and follow the
   end of the turn there.
2. The ids that were not sampled are in the whole rendering, in order, from its start on: nothing
   that the model was shown is rewritten later.
3. Control tokens spelled in contents are text: replacing the contents by a harmless word changes no
   control id.

If both ways give the same ids throughout, the template is exact. If they differ only within sampled
turns, because the template drops earlier reasoning or ends the last turn with another token, the
sampled ids stay, and the difference is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from agentloop.chat.proof.conversations import TOOLS, Abilities, Conversation, conversations, find_abilities, showcase
from agentloop.chat.proof.schemas import check_schemas
from agentloop.chat.renderer import REASONING_OPENINGS, ChatRenderer
from agentloop.errors import ModelError
from agentloop.types import Message


class Verdict(StrEnum):
    """The result of the probe conversations."""

    EXACT = "exact"  # the episode's ids are those of the template's own rendering
    KEPT = "exact with sampled turns kept"  # earlier turns are rewritten; the sampled ids stay
    REFUSED = "refused"  # episodes with this template would break the token law


@dataclass(frozen=True, slots=True)
class Difference:
    """A sampled turn, and how the template rewrites it when the conversation continues."""

    sampled: str
    rewritten: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an example: its author (`prompt`, `model` or `template`), text and ids."""

    author: str
    text: str
    ids: list[int]


@dataclass
class Proof:
    """The result for one template.

    Attributes:
        verdict: the verdict over all conversations.
        abilities: what the template can render, and why it cannot render the rest.
        reason: why the template was refused; empty if it was not.
        conversations, turns: numbers of played conversations and turns.
        differences: the first sampled turns that the template rewrites later.
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
        """Refuse a run that needs something the template cannot do.

        Args:
            tools: the run offers tools, so results follow a turn.
            users: user messages follow a turn.
            system: prompts begin with a system message.

        Raises:
            ModelError: the reason, and what to change.
        """
        if self.verdict is Verdict.REFUSED:
            raise ModelError(
                f"the chat template cannot keep the token law: {self.reason}",
                "set model.chat_template to one that passes `agentloop template`",
            )

        needs = {
            "tool results": tools,
            "reading tool calls": tools,
            "user messages after a turn": users,
            "system messages": system,
        }
        for ability, needed in needs.items():
            if needed and ability in self.abilities.missing:
                reason, _, fix = self.abilities.missing[ability].partition("\n  fix: ")
                raise ModelError(f"the run needs {ability}: {reason}", fix or "use another chat template")


class _Broken(Exception):
    """A probe conversation found a violation; the text is the reason."""


SHOWN_DIFFERENCES = 3
"""Largest number of differences that are kept to be shown."""


def prove(
    renderer: ChatRenderer, tools: Sequence[dict[str, Any]] | None = None, *, count: int = 200, seed: int = 0
) -> Proof:
    """Try a template on `count` conversations.

    Args:
        tools: the schemas that the run offers; None: those of the probe conversations, if the
            template takes any.
        count: number of conversations; 200 take a second or two.
        seed: of the random conversations.

    Raises:
        ModelError: the template cannot render the schema of a tool, which is named.
    """
    schemas = list(tools) if tools else TOOLS
    check_schemas(renderer, tools or ())
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
    """Return the abilities without tools, with the reasons why there are no tools."""
    missing = {**with_tools.missing, **without_tools.missing}
    for ability in ("user messages after a turn", "reasoning", "system messages"):
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
    """Play one conversation both ways and compare; return it piece by piece.

    Raises:
        _Broken: the two differ outside of sampled turns.
    """
    history: list[Message] = list(conversation.start)
    ids = renderer.start(history, tools)
    whole = renderer.whole(history, tools)
    if ids != whole:
        raise _Broken(f"the first prompt differs from the template's own rendering: {_around(renderer, ids, whole)}")
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

        # 1. What was appended is the end of the whole.
        if exchange.cut:
            # White space before an end-of-turn token (" </s>") cannot merge with the turn's last
            # token any more: the text is the same, but the ids are equal only from the end-of-turn
            # token on.
            first = next((i for i, token in enumerate(added) if token in renderer.encoder.ids), 0)
            added = added[first:]
        if whole[-len(added) :] != added:
            raise _Broken(
                "the ids appended after a turn differ from the template's own: "
                f"{_around(renderer, added, whole[-len(added) :])}"
            )
        _check_join(renderer, sampled, whole[: -len(added)], cut=exchange.cut)

        # 2. What was shown before stays.
        shown.append(added)
        if ids != whole:
            _check_shown(renderer, shown, whole)
            proof.verdict = Verdict.KEPT
            if not differs and len(proof.differences) < SHOWN_DIFFERENCES:
                proof.differences.append(_difference(renderer, ids, whole))
            differs = True

        # 3. Control tokens in contents stay text.
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
    """Check that the appended ids follow the end of the turn in the whole rendering too.

    Args:
        rest: the whole rendering without the appended ids.

    Raises:
        _Broken: something between them is missing, such as the newline after the closing token.
    """
    if cut:
        prompt = renderer.generation_prompt_ids  # the whole turn may be dropped reasoning
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
            "the ids appended after a turn do not join it: the template writes "
            f"{renderer.decode(rest[-8:])!r} where the turn ends in {renderer.decode(sampled[-8:])!r}"
        )


def _header(renderer: ChatRenderer) -> str:
    """Return the text that opens the model's turn, without the tag that may open its reasoning."""
    text = renderer.decode(renderer.generation_prompt_ids)
    opening = next((tag for tag in REASONING_OPENINGS if text.rstrip().endswith(tag)), None)
    return text[: text.rindex(opening)] if opening else text


def _same_end(one: str, two: str) -> bool:
    """Compare the ends of two texts without white space, which a template may trim or add."""
    return one.rstrip().endswith(two.rstrip()[-8:].lstrip())


def _check_shown(renderer: ChatRenderer, shown: Sequence[list[int]], whole: list[int]) -> None:
    """Check that everything that was not sampled is in the whole rendering, in order.

    Raises:
        _Broken: a piece is missing; the message quotes it.
    """
    prompt = renderer.generation_prompt_ids
    position = 0
    for number, piece in enumerate(shown):
        body = piece[: -len(prompt)] if prompt and piece[-len(prompt) :] == prompt else piece
        if number == 0:
            found = 0 if whole[: len(body)] == body else -1
        elif number == len(shown) - 1:
            found = len(whole) - len(piece)  # it was checked to be the end
        else:
            found = _find(whole, body, position)
        if found < position:
            raise _Broken(f"the template later rewrites what the model was shown: {renderer.decode(body)!r}")
        position = found + len(body)


def _find(ids: list[int], piece: list[int], start: int) -> int:
    """Return where `piece` first begins in `ids[start:]`; -1 if it is not there."""
    if not piece:
        return start

    first = piece[0]
    for position in range(start, len(ids) - len(piece) + 1):
        if ids[position] == first and ids[position : position + len(piece)] == piece:
            return position
    return -1


def _check_harmless(renderer: ChatRenderer, render: Any, messages: Sequence[Message]) -> None:
    """Check that control tokens spelled in contents change no control id.

    Raises:
        _Broken: they change one.
    """
    calm: list[Message] = [{**message, "content": "harmless"} for message in messages]
    controls = renderer.encoder.ids
    hostile_ids, calm_ids = ([token for token in render(each) if token in controls] for each in (messages, calm))
    if hostile_ids != calm_ids:
        raise _Broken(
            f"text in a content became a control token: {renderer.decode(hostile_ids)!r} instead of "
            f"{renderer.decode(calm_ids)!r}"
        )


def _around(renderer: ChatRenderer, one: list[int], two: list[int]) -> str:
    """Return the text around the first difference of two sequences."""
    at = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    begin = max(at - 4, 0)
    return f"{renderer.decode(one[begin : at + 8])!r} instead of {renderer.decode(two[begin : at + 8])!r}"


def _difference(renderer: ChatRenderer, ids: list[int], whole: list[int]) -> Difference:
    """Return the text of both sequences from their first difference on."""
    begin = next((i for i, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), min(len(ids), len(whole)))
    low = max(begin - 6, 0)
    sampled, rewritten = (renderer.decode(side[low : begin + 120]) for side in (ids, whole))
    return Difference(_clip(sampled), _clip(rewritten))


def _clip(text: str, size: int = 160) -> str:
    return text if len(text) <= size else f"{text[:size]}…"
