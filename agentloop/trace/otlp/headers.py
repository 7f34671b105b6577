"""Check the headers of requests to a receiver before the first one, without showing a value."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from urllib.parse import unquote

from agentloop.errors import ConfigError
from agentloop.text import clean

VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS")
"""Variables from which OpenTelemetry's exporter reads headers; the first that is not empty."""

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
"""A token of RFC 9110."""

_PART = re.compile(r"[ \t]*([!#-'*+.0-9A-Z^-z|~-]+)[ \t]*=([ !#-+\x2d-:<-\[\]-~\t]*)")
"""What OpenTelemetry reads of a variable. It logs other parts with their values, and skips them."""


def check_headers(headers: Mapping[str, str]) -> None:
    """Check the headers of the recipe.

    Raises:
        ConfigError: one cannot be sent.
    """
    for name, value in headers.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(f"trace.otlp.headers has {clean(repr(name), 80)}, which is not the name of a header")
        _check_value(f"trace.otlp.headers.{name}", value)


def check_variable() -> None:
    """Check the headers that OpenTelemetry's exporter reads from the environment.

    Raises:
        ConfigError: a part is not a header, or cannot be sent.
    """
    variable = next((name for name in VARIABLES if os.environ.get(name)), None)
    if variable is None:
        return
    parts = [part.strip() for part in os.environ[variable].split(",") if part.strip()]
    if not parts:
        raise ConfigError(f"{variable} holds no header", "write it as name=value,name=value, or unset it")
    for number, part in enumerate(parts, 1):
        found = _PART.fullmatch(part)
        # Only values without a space are percent-encoded.
        coded = found is not None and " " not in found[2].strip()
        name = "" if found is None else unquote(found[1]) if coded else found[1]
        if found is None or not _NAME.fullmatch(name):
            raise ConfigError(
                f"part {number} of {len(parts)} of {variable} is not a header",
                "write it as name=value,name=value; in a value, write a comma as %2C, a semicolon as %3B, a quotation "
                "mark as %22, a backslash as %5C",
            )
        _check_value(f"the header {name} of {variable}", (unquote(found[2]) if coded else found[2]).strip())


def _check_value(key: str, value: str) -> None:
    """Check that a header can hold a value.

    Raises:
        ConfigError: it cannot.
    """
    if not (value.isascii() and value.isprintable()):
        raise ConfigError(
            f"{key} has a character that an HTTP header cannot hold",
            "use printable ASCII characters, without a line break at the end",
        )
    if value != value.strip():
        raise ConfigError(f"{key} begins or ends with a space, which an HTTP header cannot hold", "remove the space")
