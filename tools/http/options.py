"""Read the `config` of a tool in front of a service."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from agentloop.errors import ToolConfigError
from agentloop.text import did_you_mean

_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


class Options:
    """A tool's `config`, read key by key; `done` refuses what was not asked for.

    Args:
        name: the tool's, for messages.
        config: as in the tool YAML. A null is a key that is not given.

    Raises:
        ToolConfigError: by each method; names the tool, the key and what it may be.
    """

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self._name = name
        self._config = {key: value for key, value in config.items() if value is not None}
        self._known: list[str] = ["type"]

    def has(self, key: str) -> bool:
        self._known.append(key)
        return key in self._config

    def whole(self, key: str, default: int, least: int, most: int) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._wrong(key, value, f"give a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float, least: float, most: float) -> float:
        """Return a finite number, `least` excluded."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._wrong(key, value, "give a number")
        if not least < value <= most:
            raise self._wrong(key, value, f"give a number above {least:g}, at most {most:g}")
        return float(value)

    def text(self, key: str, default: str | None = None, choices: Sequence[str] = ()) -> str | None:
        value = self._get(key, default)
        if value is not None and (not isinstance(value, str) or not value):
            raise self._wrong(key, value, "give a text")
        if choices and value is not None and value not in choices:
            raise self._wrong(key, value, f"one of: {', '.join(choices)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def texts(self, key: str) -> dict[str, str]:
        """Return a mapping of texts, such as headers; their values are not repeated in messages."""
        value = self._get(key, {})
        if not isinstance(value, Mapping) or not all(isinstance(item, str) for pair in value.items() for item in pair):
            raise ToolConfigError(
                f"{self._name}: config.{key} is not a mapping of texts", f"write {key}: {{name: text}}"
            )
        return dict(value)

    def headers(self) -> dict[str, str]:
        """Return the mapping `headers`: names and values that a request can hold."""
        found = self.texts("headers")
        for name, value in found.items():
            if not _HEADER.fullmatch(name):
                raise ToolConfigError(
                    f"{self._name}: config.headers has the name {name[:80]!r}, which no request can hold",
                    "write letters, digits and hyphens",
                )
            wrong = next((place for place, sign in enumerate(value) if not " " <= sign <= "~"), None)
            if wrong is None and value == value.strip():
                continue
            what = "begins or ends with a blank" if wrong is None else f"has {value[wrong]!a} as character {wrong + 1}"
            raise ToolConfigError(
                f"{self._name}: the value of config.headers.{name} {what}, which no request can hold",
                "write printable ASCII; an environment variable may end with a line break",
            )
        return found

    def secret(self, key: str) -> str | None:
        """Return the value of the environment variable that a key names; None: it is not given."""
        variable = self.text(key)
        if variable is None:
            return None
        value = os.environ.get(variable)
        if not value:
            raise ToolConfigError(
                f"{self._name}: config.{key} names {variable}, which is not set", f"export {variable}=..."
            )
        return value

    def done(self, ignored: Sequence[str] = ()) -> None:
        """Refuse unknown keys, except `ignored`: known to other frameworks, without effect here."""
        unknown = [key for key in self._config if key not in self._known and key not in ignored]
        if unknown:
            known = sorted(set(self._known))
            raise ToolConfigError(
                f"{self._name}: config has the unknown key {unknown[0]!r}",
                did_you_mean(str(unknown[0]), known, f"known keys: {', '.join(known)}"),
            )

    def _get(self, key: str, default: Any) -> Any:
        self._known.append(key)
        return self._config.get(key, default)

    def _wrong(self, key: str, value: Any, fix: str) -> ToolConfigError:
        return ToolConfigError(f"{self._name}: config.{key} is {repr(value)[:80]}", fix)
