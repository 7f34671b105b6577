"""Find how a chat template ends an assistant's turn, by rendering known turns.

A probe's last words are known, so the template wrote the text after them. Three renderings show
which part of that text ends the turn and which part opens the next one:

    alone      nothing follows, no generation prompt  ANSWER<|im_end|>\\n
    prompted   nothing follows, generation prompt     ANSWER<|im_end|>\\n<|im_start|>assistant\\n
    followed   a new message follows                  ANSWER<|im_end|>\\n<|im_start|>user\\n...

The common beginning of `alone` and `followed` ends the turn: here `<|im_end|>`. If they have no
common beginning, that of `prompted` and `followed` does: gpt-oss ends the last answer of a
conversation with `<|return|>`, and every other one with `<|end|>`. If there is none either, no
token ends a turn: a GLM model stops by sampling the token that opens the next turn.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from agentloop.chat.tokenizer import SafeEncoder
from agentloop.errors import ModelError


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """The end of one kind of turn.

    Attributes:
        closer: spelling of the control token that ends the turn within a conversation; None: no
            token does.
        nth: the closer is the nth control token after the probe's last words; 0 without a closer.
        final: spelling of the token that ends the last turn of a conversation; None without a
            closer.
        tail: without a closer, the template's text after the last words, which the model therefore
            samples.
    """

    closer: str | None
    nth: int
    final: str | None
    tail: str = ""


def find_turn_end(
    encoder: SafeEncoder, *, alone: str, prompted: str, followed: str, answer: TurnEnd | None = None
) -> TurnEnd:
    """Find the end of a turn.

    Args:
        alone, prompted, followed: the three renderings, each from the end of the probe's last words
            on.
        answer: the end of a plain answer, if the turn has tool calls: tokens that close the calls,
            such as `</tool_call>`, do not end the turn.

    Raises:
        ModelError: no control token ends the turn or opens the next, so an engine could not stop
            there.
    """
    alone_controls, followed_controls = _controls(encoder, alone), _controls(encoder, followed)

    if answer is None or answer.closer is not None:
        shared = _shared(alone, alone_controls, followed, followed_controls)
        spellings = [match.group() for match in followed_controls[:shared]]
        if answer is not None and answer.closer in spellings:
            shared = spellings.index(answer.closer) + 1
        if shared:
            closer = followed_controls[shared - 1].group()
            return TurnEnd(closer, shared, closer)

        # The last turn ends in a special token.
        if alone_controls and _shared(prompted, _controls(encoder, prompted), followed, followed_controls):
            nth = min(len(alone_controls), len(followed_controls))
            return TurnEnd(followed_controls[nth - 1].group(), nth, alone_controls[-1].group())

    # No token ends the turn: the token that opens the next turn must follow at once.
    tail = alone.rstrip()
    opening = encoder.find_control(followed, len(tail))
    if not followed.startswith(tail) or opening is None or followed[len(tail) : opening.start()].strip():
        raise ModelError(
            f"the chat template continues after an assistant turn with {followed[:80]!r}: there is no end-of-turn "
            "token at which an engine could stop",
            "use a template whose turns end in an added token such as <|im_end|>, or add that token to the tokenizer",
        )
    return TurnEnd(None, 0, None, tail)


def without_generation_prompt(alone: str, question_alone: str) -> str:
    """Return `alone` without the generation prompt, for a template that always writes one.

    Args:
        question_alone: rendering of a question with nothing after it. The common end of the two
            renderings is the generation prompt.
    """
    size = 0
    limit = min(len(alone), len(question_alone))
    while size < limit and alone[-size - 1] == question_alone[-size - 1]:
        size += 1
    return alone[: len(alone) - size]


def _controls(encoder: SafeEncoder, text: str) -> list[re.Match[str]]:
    return list(encoder.pattern.finditer(text))


def _shared(one: str, one_controls: list[re.Match[str]], two: str, two_controls: list[re.Match[str]]) -> int:
    """Count the control tokens that both texts begin with, the text between them included."""
    count = 0
    for first, second in zip(one_controls, two_controls, strict=False):
        if one[: first.end()] != two[: second.end()]:
            break
        count += 1
    return count
