"""Make and measure every task once before a run; drop or cut prompts that are too long.

Only the longest user text is ever cut: without its system message, its tools or one of its turns, a
conversation would be a different task.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from agentloop.data.tasks import CutText, Tasks
from agentloop.errors import DataError, ImageError, ModelError
from agentloop.images import row_place
from agentloop.types import Message, Task

Overlong = Literal["drop", "error", "left", "right", "middle"]

CUT_MARK = "[... {} tokens cut ...]"
"""Replaces the text that was cut out of a prompt."""

MOST_CUTS = 8
"""Attempts to cut one prompt: beside the mark, the remaining text may tokenize differently."""


class Renders(Protocol):
    """The part of a `ChatRenderer` that measures prompts and cuts them."""

    tokenizer: Any

    def start(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> list[int]: ...


@dataclass(frozen=True)
class PromptLimit:
    """The limit of a first prompt.

    Attributes:
        tokens: maximum tokens.
        name: what limits it, for messages.
        fix: how to raise it, for messages.
    """

    tokens: int
    name: str
    fix: str

    @classmethod
    def of(cls, limit: int, context: int | None) -> PromptLimit:
        """Return the tighter of `data.max_prompt_tokens` and the model's context, which also needs
        room for one sampled token."""
        if context is not None and context - 1 < limit:
            name = f"the model's context of {context} tokens has room for beside an answer"
            return cls(context - 1, name, "shorten the prompts, or use a model with a longer context")
        return cls(limit, f"data.max_prompt_tokens {limit}", "raise data.max_prompt_tokens")


@dataclass
class ValidatedRows:
    """Result of the pass.

    Attributes:
        tasks: tasks whose first prompt fits, tool schemas included; some prompts were cut.
        without_agent: number of rows without `agent_name`.
        dropped: number of rows left out because of their length.
        cut: number of rows whose prompt was cut.
        longest: tokens of the longest prompt, before cutting.
        agents: names of the agent loops that the tasks run.
        system: whether any prompt begins with a system message.
        places: index in `tasks` of the first task with a task id.
        limit: the limit of the prompts.
        unreadable: number of rows with an image that cannot be read. They stay: their episodes fail
            alone.
        first_unreadable: the error of the first of them, which names row and image; None: there is
            none.
    """

    tasks: Tasks
    without_agent: int = 0
    dropped: int = 0
    cut: int = 0
    longest: int = 0
    agents: set[str] = field(default_factory=set)
    system: bool = False
    places: dict[str, int] = field(default_factory=dict)
    limit: PromptLimit = field(default_factory=lambda: PromptLimit(0, "", ""))
    unreadable: int = 0
    first_unreadable: ImageError | None = None


def check_tasks(
    tasks: Tasks,
    key: str,
    *,
    renderer: Renders,
    schemas: list[dict[str, Any]] | None,
    limit: int,
    overlong: Overlong,
    context: int | None = None,
    check: Callable[[Task, str], None] = lambda _task, _where: None,
    on_row: Callable[[int, int], None] = lambda _done, _total: None,
) -> ValidatedRows:
    """Make and measure every task once.

    Args:
        key: the config key, for messages.
        schemas: schemas of the tools that the run offers; None: no tools.
        limit: maximum tokens of a first prompt.
        overlong: what to do with a longer one.
        context: longest sequence of the model; None: unknown.
        check: an additional check of a task, such as of its agent; the second argument names the
            row.
        on_row: called with the number of rows done and the total.

    Raises:
        DataError: a row is wrong, a prompt is too long with `overlong: error`, or no row is left.
        ImageError: no row has images that can be read.
        ModelError: the chat template cannot render a prompt.
        UserError: what `check` raises. Each names file and row.
    """
    named = PromptLimit.of(limit, context)
    found = ValidatedRows(tasks, limit=named)
    kept: list[int] = []
    cuts: dict[int, CutText] = {}
    for index, (task, names_agent) in enumerate(tasks.walk()):
        where = f"{key}: {tasks.where(index)}"
        check(task, where)

        found.without_agent += not names_agent
        try:
            with _named(where, task):
                length = len(renderer.start(task.prompt, schemas))
                fits = length <= named.tokens
                if not fits and overlong in ("left", "right", "middle"):
                    cut = cut_prompt(task.prompt, renderer, schemas, named.tokens, overlong)
                    if cut is not None:
                        cuts[index], fits = cut, True
        except ImageError as exc:
            found.unreadable += 1
            first = found.first_unreadable = found.first_unreadable or exc
            if found.unreadable == len(tasks):  # most likely a wrong folder
                reason = first.message.removeprefix(f"{key}: ")
                fault = f"{key}: none of the {len(tasks)} rows has images that can be read; {reason}"
                raise ImageError(fault, first.hint) from exc
            length, fits = 0, True
        found.longest = max(found.longest, length)
        if not fits and overlong == "error":
            raise DataError(
                f"{where}: the prompt has {length} tokens, more than {named.name}",
                f"{named.fix}, or set data.overlong to drop, left, right or middle",
            )

        if fits:
            found.places.setdefault(task.task_id, len(kept))
            kept.append(index)
            found.agents.add(task.agent_name)
            found.system |= task.prompt[0]["role"] == "system"

        on_row(index + 1, len(tasks))

    if not kept:
        raise DataError(
            f"{key}: every prompt is longer than {named.name}; the longest has {found.longest}",
            f"{named.fix}; it has to be {found.longest + (named.tokens != limit)} or more",
        )

    found.dropped, found.cut = len(tasks) - len(kept), len(cuts)
    found.tasks = tasks.select(kept, cuts) if found.dropped or cuts else tasks
    return found


@contextlib.contextmanager
def _named(where: str, task: Task) -> Iterator[None]:
    """Name the row in any error of a prompt: templates are code that came with the model."""
    place = f"{where}: column 'prompt'"
    try:
        yield
    except ImageError as exc:
        place = f"{where}: {row_place(exc.number, task.prompt, task.images, 'prompt')}"
        raise ImageError(f"{place}: {exc.message}", exc.hint, exc.number) from exc
    except (DataError, ModelError) as exc:
        raise type(exc)(f"{place}: {exc.message}", exc.hint) from exc
    except Exception as exc:
        raise DataError(
            f"{place} cannot be rendered: {type(exc).__name__}: {exc}", "correct the row, or the chat template"
        ) from exc


def cut_prompt(
    prompt: Sequence[Message],
    renderer: Renders,
    schemas: list[dict[str, Any]] | None,
    limit: int,
    side: Literal["left", "right", "middle"],
) -> CutText | None:
    """Cut a prompt's longest user text until the prompt has `limit` tokens; None: impossible.

    Args:
        side: where tokens are removed and a mark that counts them is put.

    The text is cut between tokens and unchanged elsewhere: with `right` and 3 of 5 tokens left,
    "one two three four five" becomes "one two three\\n[... 2 tokens cut ...]".
    """
    texts = list(_user_texts(prompt))
    if not texts:
        return None

    spans_of = [_token_spans(renderer.tokenizer, text) for _, _, text in texts]
    place = max(range(len(texts)), key=lambda i: len(spans_of[i]))
    message, part, text = texts[place]
    spans = spans_of[place]
    excess = len(renderer.start(prompt, schemas)) - limit
    left = len(spans) - excess

    for _ in range(MOST_CUTS):
        if left <= 0:
            return None
        cut = CutText(message, part, _cut(text, spans, left, side))
        excess = len(renderer.start(cut.applied(prompt), schemas)) - limit
        if excess <= 0:
            return cut
        left -= excess
    return None


def _cut(text: str, spans: Sequence[tuple[int, int]], left: int, side: str) -> str:
    """Return `text` with `left` of its tokens, and on a separate line a mark for the others."""
    mark = CUT_MARK.format(len(spans) - left)
    head = left if side == "right" else 0 if side == "left" else (left + 1) // 2
    tail = left - head
    before = text[: spans[head - 1][1]] if head else ""
    after = text[spans[-tail][0] :] if tail else ""
    return "\n".join(piece for piece in (before, mark, after) if piece)


def _token_spans(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Return begin and end of each token in `text`; tokens of one character share its span."""
    offsets: list[tuple[int, int]] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets
    return offsets


def _user_texts(prompt: Sequence[Message]) -> Iterator[tuple[int, int | None, str]]:
    """Iterate over the texts of users: message index, part index or None, text."""
    for number, message in enumerate(prompt):
        if message["role"] != "user":
            continue
        content = message["content"]
        if isinstance(content, str):
            yield number, None, content
            continue
        for index, part in enumerate(content):
            if isinstance(part.get("text"), str):
                yield number, index, part["text"]
