"""Read YAML files that may be wrong or hostile: bounded in size, depth and expanded aliases."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentloop.errors import UserError

if TYPE_CHECKING:
    from yaml import Node

MAX_BYTES = 2**20
MAX_DEPTH = 64
MAX_NODES = 100_000
"""Values of a file once its aliases are expanded; each level of aliases can multiply them."""


def read_yaml_text(path: Path, name: str, error: type[UserError], missing_hint: str = "give an existing file") -> str:
    """Return the text of a YAML file; a mark at its start is left out.

    Args:
        name: what the file is, for messages: `config file recipe.yaml`.
        error: class of the error to raise.

    Raises:
        UserError: an `error`, if it is missing, is not a regular file, is too large, cannot be
            read, or is not UTF-8.
    """
    try:
        if not path.is_file():
            there = path.exists()
            raise error(f"{name} is not a file" if there else f"{name} does not exist", missing_hint)
        if path.stat().st_size > MAX_BYTES:
            raise error(f"{name} has more than {MAX_BYTES >> 20} MB", "give a YAML file of settings, not of data")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as exc:  # ValueError: not UTF-8, or a NUL in the path
        raise error(f"{name} cannot be read: {_reason(exc)}", "give a readable YAML file in UTF-8") from exc


def compose(text: str, name: str, error: type[UserError]) -> Node | None:
    """Parse YAML into nodes, which keep the text of each scalar; None for an empty document.

    Raises:
        UserError: an `error`, if the text is not YAML, or is too large or too deep when its aliases
            are expanded. The message has line and column, and none of the text, which may hold a
            secret.
    """
    import yaml

    try:
        node: Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as exc:
        what = f"{name} is not valid YAML: {describe_yaml_error(exc)}"
        raise error(what, "check its indentation, colons and quotes") from exc
    except RecursionError as exc:
        raise _too_deep(name, error) from exc
    if node is not None:
        size, _ = _measure(node, {}, 0, name, error)
        if size > MAX_NODES:
            raise error(
                f"{name} has more than {MAX_NODES:,} values when its aliases (*name) are expanded", "shorten it"
            )
    return node


def describe_yaml_error(exc: Exception) -> str:
    """Return the problem and its line, without the lines of the file that YAML would quote."""
    problem = str(getattr(exc, "problem", None) or getattr(exc, "reason", None) or type(exc).__name__)
    mark: Any = getattr(exc, "problem_mark", None) or getattr(exc, "context_mark", None)
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else problem


def _measure(
    node: Node, known: dict[int, tuple[int, int]], depth: int, name: str, error: type[UserError]
) -> tuple[int, int]:
    """Return number of values and depth below a node; an alias counts as what it stands for."""
    if id(node) not in known:
        if depth > MAX_DEPTH:  # also of a node that contains itself
            raise _too_deep(name, error)
        children: list[Node] = []
        for child in node.value if isinstance(node.value, list) else ():
            children += child if isinstance(child, tuple) else [child]
        measured = [_measure(child, known, depth + 1, name, error) for child in children]
        known[id(node)] = (
            1 + sum(size for size, _ in measured),
            1 + max((height for _, height in measured), default=0),
        )
    size, height = known[id(node)]
    if depth + height > MAX_DEPTH + 1:
        raise _too_deep(name, error)
    return size, height


def _too_deep(name: str, error: type[UserError]) -> UserError:
    return error(f"{name} is nested more than {MAX_DEPTH} levels deep", "write it flatter")


def _reason(exc: Exception) -> str:
    if isinstance(exc, UnicodeDecodeError):
        return f"byte {exc.start} is not UTF-8"
    return (exc.strerror if isinstance(exc, OSError) else None) or str(exc)
