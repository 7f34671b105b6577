"""How a chat template ends an assistant's turn, found by rendering turns that are known.

A probe's last words are known, so what stands behind them in a rendering is the template's. Three renderings tell what
of it ends the turn and what opens the next one:

    alone      nothing follows, no generation prompt       ANSWER<|im_end|>\\n
    prompted   nothing follows, generation prompt          ANSWER<|im_end|>\\n<|im_start|>assistant\\n
    followed   a new message follows                       ANSWER<|im_end|>\\n<|im_start|>user\\n...

What `alone` and `followed` begin with alike ends the turn: here `<|im_end|>`. Where they differ at once, `prompted` and
`followed` tell: gpt-oss ends the last answer of all with `<|return|>`, every other one with `<|end|>`. Where these
differ too nothing ends a turn: GLM's next turn begins, and the model stops by sampling the token that opens it.
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
        closer: spelling of the control token that ends the turn in a conversation; None: nothing does.
        nth: the closer is the nth control token behind the probe's last words; 0 without a closer.
        final: spelling of the token that ends it when it is the last of all; None without a closer.
        tail: what the template writes behind the last words and the model therefore samples, where nothing closes.
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
        alone, prompted, followed: the three renderings, each from behind the probe's last words on.
        answer: the end of a plain answer, when the turn is one with tool calls: the closers of calls themselves, such
            as `</tool_call>`, are no ends of the turn.

    Raises:
        ModelError: no control token ends the turn or opens the next, so an engine could not stop there.
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
        if alone_controls and _shared(prompted, _controls(encoder, prompted), followed, followed_controls):
            nth = min(len(alone_controls), len(followed_controls))
            return TurnEnd(followed_controls[nth - 1].group(), nth, alone_controls[-1].group())
    tail = alone.rstrip()
    opening = encoder.find_control(followed, len(tail))
    if not followed.startswith(tail) or opening is None or followed[len(tail) : opening.start()].strip():
        raise ModelError(
            f"the chat template goes on after an assistant turn with {followed[:80]!r}: it holds no end-of-turn token "
            "at which an engine could stop",
            "use a template whose turns end in an added token such as <|im_end|>, or add that token to the tokenizer",
        )
    return TurnEnd(None, 0, None, tail)


def without_generation_prompt(alone: str, question_alone: str) -> str:
    """`alone` without the generation prompt of a template that writes one whether it is asked to or not.

    Args:
        question_alone: rendering of a question, with nothing behind it. What both end in is the generation prompt.
    """
    size = 0
    limit = min(len(alone), len(question_alone))
    while size < limit and alone[-size - 1] == question_alone[-size - 1]:
        size += 1
    return alone[: len(alone) - size]


def _controls(encoder: SafeEncoder, text: str) -> list[re.Match[str]]:
    return list(encoder.pattern.finditer(text))


def _shared(one: str, one_controls: list[re.Match[str]], two: str, two_controls: list[re.Match[str]]) -> int:
    """How many control tokens, the text between them included, both begin with."""
    count = 0
    for first, second in zip(one_controls, two_controls, strict=False):
        if one[: first.end()] != two[: second.end()]:
            break
        count += 1
    return count
