"""Find the messages of a trajectory that the model sampled."""

from __future__ import annotations

from collections.abc import Sequence

from agentloop.types import Message, Turn


def turns_of_messages(messages: Sequence[Message], turns: Sequence[Turn]) -> dict[int, Turn]:
    """Return which message shows which turn, by the message's index.

    A prompt may hold messages of the assistant that nobody sampled (examples), and an agent may
    insert some. So the turns are looked for from the last one backwards, by their text; if no
    message has it, the last one of the assistant is taken.
    """
    found: dict[int, Turn] = {}
    end = len(messages)
    for turn in reversed(turns):
        spoken = [at for at in range(end) if messages[at].get("role") == "assistant"]
        if not spoken:
            break
        same = [at for at in spoken if messages[at].get("content") == turn.text]
        end = (same or spoken)[-1]
        found[end] = turn
    return dict(sorted(found.items()))
