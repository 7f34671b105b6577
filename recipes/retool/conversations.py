r"""Conversations of ReTool-SFT: texts with tags become messages with calls of the interpreter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from agentloop.errors import DataError
from agentloop.reward.boxed import last_boxed
from tools.code.shown import NOTHING
from tools.code.source import program_in

Row = dict[str, Any]

TOOL = "code_interpreter"

MOST_MISFITS = 0.1
"""Share of the conversations that may be left out because their tags do not pair."""

QUESTION_MARK = "*user question:*"
"""Stands in front of the question in a user's text."""

_TAG = re.compile(r"</?(?:code|interpreter|answer)>")


def read_conversations(rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, list[Row]]]:
    """Yield the question and the turns that follow it, for each row whose tags pair.

    Others are left out, and their number is printed.

    Args:
        rows: places in words, for messages, and rows `{messages: [user, assistant]}`.

    Raises:
        DataError: a row has no question and no solution, or too many do not fit.
    """
    total, misfits = 0, []
    for where, row in rows:
        total += 1
        question, solution = _texts(row, where)
        try:
            yield question_in(question), turns_in(solution)
        except ValueError as exc:
            misfits.append(f"{where}: {exc}")

    if len(misfits) > MOST_MISFITS * total:
        raise DataError(
            f"{misfits[0]}; {len(misfits)} of {total} conversations do not fit",
            "give rows of ReTool-SFT: <code>, <interpreter> and <answer> in the solution",
        )
    if misfits:
        print(f"ReTool-SFT: {len(misfits)} of {total} conversations left out; the first: {misfits[0]}")


def question_in(text: str) -> str:
    r"""Return the question in a user's text of ReTool-SFT, without the directions around it.

    In front of it are the directions about tags; after it the form of the answer, and the line that
    announces it. Some questions begin with a line that asks for `\boxed{answer}`.

    Raises:
        ValueError: the mark in front of the question is missing, or nothing follows it.
    """
    _, found, question = text.partition(QUESTION_MARK)
    if not found:
        raise ValueError(f"the question is not marked by {QUESTION_MARK}")
    before, form, _ = question.rpartition("<answer>")
    lines = (before if form else question).strip().lstrip("*").strip().split("\n")
    if form and len(lines) > 1:
        lines.pop()
    if len(lines) > 1 and r"\boxed{answer}" in lines[0]:
        lines.pop(0)
    question = "\n".join(lines).strip()
    if not question:
        raise ValueError("the question is empty")
    return question


def turns_in(solution: str) -> list[Row]:
    """Return the messages of a solution: calls, results, and the answer.

    `<code>` becomes a call of `code_interpreter` after the text in front of it, `<interpreter>` its
    result, and `<answer>` the end of the last text.

    Raises:
        ValueError: the tags do not pair, or the answer has no box.
    """
    messages: list[Row] = []
    position = 0
    while (begin := solution.find("<code>", position)) >= 0:
        text = solution[position:begin].strip()
        _without_tags(text)
        code, after = _between(solution, "code", begin)
        program = program_in(code.strip()).strip("\n")
        if not program.strip():
            raise ValueError("a program is empty")
        output, position = _between(solution, "interpreter", after)
        function = {"name": TOOL, "arguments": {"code": program}}
        messages += [
            {"role": "assistant", "content": text, "tool_calls": [{"type": "function", "function": function}]},
            {"role": "tool", "content": output.strip("\n") or NOTHING},
        ]
    begin = solution.find("<answer>", position)
    if begin < 0:
        raise ValueError("it has no <answer> after its last program")
    text = solution[position:begin].strip()
    _without_tags(text)
    answer, _ = _between(solution, "answer", begin)
    if last_boxed(answer) is None:
        raise ValueError(r"its answer has no \boxed{}")
    return [*messages, {"role": "assistant", "content": f"{text}\n{answer.strip()}".strip()}]


def _between(text: str, tag: str, position: int) -> tuple[str, int]:
    """Return what is in a tag that opens at a position, white space aside, and where it ends."""
    opened, closed = f"<{tag}>", f"</{tag}>"
    begin = text.find(opened, position)
    if begin < 0 or text[position:begin].strip():
        raise ValueError(f"{opened} does not follow at character {position}")
    end = text.find(closed, begin)
    if end < 0:
        raise ValueError(f"{opened} at character {begin} is not closed")
    return text[begin + len(opened) : end], end + len(closed)


def _without_tags(text: str) -> None:
    found = _TAG.search(text)
    if found:
        raise ValueError(f"{found.group()} stands alone")


def _texts(row: Any, where: str) -> tuple[str, str]:
    """Return question and solution of a row `{messages: [user, assistant]}`."""
    messages = row.get("messages") if isinstance(row, dict) else None
    plain = [m for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
    texts = [m.get("content") for m in plain]
    if [m.get("role") for m in plain] != ["user", "assistant"] or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"{where} has no 'messages' with one text of a user and one of an assistant",
            "give the columns of JoeYing/ReTool-SFT",
        )
    return str(texts[0]), str(texts[1])
