"""The bearer token of a server, from a file."""

from __future__ import annotations

import stat
from pathlib import Path

from agentloop.errors import ConfigError
from agentloop.wire import bearer

MOST_TOKEN = 4096
"""Characters of a token; HTTP headers end at a few times that."""


def read_token(path: Path) -> str:
    """Return the token that a file holds.

    Raises:
        ConfigError: the file cannot be read, is empty, or no HTTP header can hold the token.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for, a device has no end
            raise ConfigError(f"--token-file {path} is not a regular file", "give a text file that holds the token")
        with path.open() as file:
            token = file.read(MOST_TOKEN + 1).strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(
            f"--token-file {path} cannot be read: {exc}", "give a text file that holds the token"
        ) from exc
    if len(token) > MOST_TOKEN:
        raise ConfigError(f"--token-file {path} holds more than {MOST_TOKEN:,} characters", "give a file with a token")
    if not token:
        raise ConfigError(f"--token-file {path} is empty", "write a token of printable ASCII characters into it")
    bearer(token, f"the token in {path}")
    return token
