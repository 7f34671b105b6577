"""Secrets of a tool YAML: resolved for the tool, hidden from everybody else.

A tool YAML is shared and copied; a key of a service is not. `${oc.env:NAME}` in the `config` of an
entry stands for an environment variable, as in a recipe. What it stands for is a secret if it is
below `headers` or `env`, or if its key or its variable is named like one. So is what stands there
in the file itself, but for ordinary values (`ordinary.py`). Results and errors of the
tool show `(hidden)` in its place, whoever wrote it there and however it is spelled
(`spellings.py`): a server that repeats its environment tells the model, and the trace, nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from agentloop.errors import ToolConfigError
from agentloop.text import HIDDEN, SECRET_KEY
from agentloop.tool.ordinary import is_ordinary
from agentloop.tool.spellings import SHORTEST, spellings_of

LONG_WORD = 10
"""Characters of a word of a secret that is hidden by itself: the token of `Bearer TOKEN`, and not
`Bearer`."""

_VARIABLE = re.compile(r"\$\{\s*oc\.env:\s*([A-Za-z_][A-Za-z0-9_]*)")
_SHELL = re.compile(r"\$\{(?:env:)?([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_SECRET_NAME = re.compile(r"token|password|secret|key|credential|auth", re.IGNORECASE)
_PRIVATE = ("headers", "env")
_DEFAULT = re.compile(r"\$\{\s*oc\.env:\s*[A-Za-z_][A-Za-z0-9_]*\s*,\s*['\"]?([^}'\"]*)")
_TOKEN_VARIABLE = re.compile(r"(?:^|_)token_env$")
"""Keys that name the variable of a token, `token_env`."""


def resolved(config: dict[str, Any], where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a config without interpolations, and the secrets in it.

    Args:
        where: the entry, for messages.

    Raises:
        ToolConfigError: a variable is not set, or an interpolation cannot be read.
    """
    written = list(_texts(config, ()))
    if not any("${" in text for _, text in written):
        return config, _secrets(written)

    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for place, text in written:
        for name in _VARIABLE.findall(text):
            if name not in os.environ and not re.search(name + r"\s*,", text):
                raise ToolConfigError(
                    f"{where}: config.{'.'.join(place)} names the environment variable {name}, which is not set",
                    f"export {name}=...",
                )
    try:
        found = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    except (OmegaConfBaseException, ValueError, TypeError, RecursionError) as exc:
        raise ToolConfigError(
            f"{where}: an interpolation of config cannot be resolved: {type(exc).__name__}",
            "write ${oc.env:NAME}; a text with ${ in it is written \\${",
        ) from None
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}, _secrets(written)


def from_shell(node: Any) -> Any:
    """Return settings of another program with its variables in the form that `resolved` reads.

    `${NAME}` and `${env:NAME}` become `${oc.env:NAME}`. `${NAME:-text}` becomes `text` where the
    variable is not set, or is empty.
    """
    if isinstance(node, dict):
        return {key: from_shell(item) for key, item in node.items()}
    if isinstance(node, list):
        return [from_shell(item) for item in node]
    if not isinstance(node, str):
        return node

    def written(found: re.Match[str]) -> str:
        given = found[2] is None or os.environ.get(found[1])
        return f"${{oc.env:{found[1]}}}" if given else found[2]

    return _SHELL.sub(written, node)


def hide(text: str, secrets: Sequence[str]) -> str:
    """Return a text in which the secrets are `(hidden)`, in each of their spellings.

    The longest are replaced first.
    """
    for spelling in spellings_of(tuple(secrets)):
        text = spelling.replaced(text, HIDDEN)
    return text


def _secrets(written: Sequence[tuple[tuple[str, ...], str]]) -> tuple[str, ...]:
    found: set[str] = set()
    for place, text in written:
        key = place[-1] if place else ""
        private = any(each in _PRIVATE for each in place[:-1])
        named = SECRET_KEY.search(key) is not None or (private and _SECRET_NAME.search(key) is not None)
        # What stands in the file: the text, or what is taken where a variable is not set.
        literals = _DEFAULT.findall(text) if "${" in text else [text]
        for literal in literals:
            if named or (private and not is_ordinary(key, literal)):
                words = [word for word in literal.split() if len(word) >= LONG_WORD]
                found.update((literal, *(word for word in words if named or not is_ordinary(key, word))))
        for name in _VARIABLE.findall(text):
            if private or _SECRET_NAME.search(name) or SECRET_KEY.search(".".join(place)):
                found.add(os.environ.get(name, ""))
        if _TOKEN_VARIABLE.search(key):
            found.add(os.environ.get(text, ""))
    return tuple(sorted((each for each in found if len(each) >= SHORTEST), key=len, reverse=True))


def _texts(node: Any, place: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield the texts of a config with their places."""
    if isinstance(node, str):
        yield place, node
    elif isinstance(node, dict):
        for key, item in node.items():
            yield from _texts(item, (*place, str(key)))
    elif isinstance(node, list):
        for number, item in enumerate(node):
            yield from _texts(item, (*place, str(number)))
