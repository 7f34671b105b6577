"""Passages as the model reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from agentloop.errors import ToolError
from tools.tokens import cut_end, estimated_tokens

SEPARATOR = "\n---\n"
"""Between the passages of two queries."""

NOTHING = "No document was found."


def read_result(answer: Any, queries: int) -> list[list[str]]:
    """Return the contents of the passages of each query, best first.

    The answer is `{"result": [[{"document": {"contents": "title\\ntext"}, "score": 0.9}]]}`, or has
    the passages without scores.

    Raises:
        ToolError: it has another form; it is shown in part.
    """
    lists = answer.get("result") if isinstance(answer, dict) else None
    if not isinstance(lists, list) or len(lists) != queries or not all(isinstance(found, list) for found in lists):
        raise _malformed(answer, f'it has no "result" with {queries} lists of documents')
    return [[_contents(document) for document in found] for found in lists]


def show_passages(
    queries: Sequence[str],
    found: Sequence[Sequence[str]],
    *,
    most_tokens: int | None = None,
    most_document_tokens: int | None = None,
) -> tuple[str, int]:
    """Return the text that the model reads, and how many passages are in it.

    A passage is `Doc 1 (Title: Pavia Cathedral)`, a line end, and its text. Under `most_tokens` the
    best passage of each query comes first, then the second one of each, as long as they fit whole;
    the first passage is cut rather than left out.
    """
    shown: list[list[str]] = [[] for _ in queries]
    left = most_tokens
    for place, rank, contents in _by_rank(found):
        text = _document(rank, contents, most_document_tokens)
        if left is not None:
            size = estimated_tokens(text)
            if size > left:
                if any(shown):
                    break
                text = cut_end(text, left)
            left -= size
        shown[place].append(text)

    texts = []
    for query, passages, all_found in zip(queries, shown, found, strict=True):
        heading = f"Query: {query}\n" if len(queries) > 1 else ""
        missing = len(all_found) - len(passages)
        note = f"[cut: {missing} further documents do not fit]" if missing else ""
        body = "".join(f"{passage}\n\n" for passage in passages) + note if all_found else NOTHING
        texts.append((heading + body).rstrip("\n"))
    return SEPARATOR.join(texts), sum(map(len, shown))


def _by_rank(found: Sequence[Sequence[str]]) -> Iterator[tuple[int, int, str]]:
    """Yield (query, rank, contents): the best passage of each query, then the second of each."""
    for rank in range(max(map(len, found), default=0)):
        for place, passages in enumerate(found):
            if rank < len(passages):
                yield place, rank, passages[rank]


def _document(rank: int, contents: str, most_tokens: int | None) -> str:
    title, _, text = contents.partition("\n")
    if most_tokens is not None:
        text = cut_end(text, most_tokens)
    return f"Doc {rank + 1} (Title: {title.strip()})\n{text.strip()}"


def _contents(found: Any) -> str:
    document = found.get("document", found) if isinstance(found, dict) else found
    if isinstance(document, str):
        return document
    if isinstance(document, dict):
        if isinstance(document.get("contents"), str):
            return str(document["contents"])
        if isinstance(document.get("text"), str):
            return f"{document.get('title') or ''}\n{document['text']}"
    raise _malformed(found, "a document has no text `contents`")


def _malformed(answer: Any, reason: str) -> ToolError:
    return ToolError(
        f"the answer of the retrieval service cannot be read: {reason}: {repr(answer)[:200]}",
        'it has to answer {"result": [[{"document": {"contents": "title\\ntext"}, "score": 0.9}]]}',
        final=True,
    )
