"""Whether weave will find an API key: found out without weave, whose import takes seconds."""

from __future__ import annotations

import configparser
import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

from agentloop.errors import ConfigError
from agentloop.wire import is_local

WANDB = "https://api.wandb.ai"
TRACES = "https://trace.wandb.ai"
"""Where weave sends calls if W&B has its usual address."""

KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
"""Variables that hold a key, or the file of a token that stands for one."""


def check_key() -> None:
    """Check that there is a key for weave's server. Of files that cannot be read, nothing is known.

    Raises:
        ConfigError: there is none, and the server is not on this machine.
    """
    if any(os.environ.get(variable) for variable in KEYS):
        return
    try:
        base = os.environ.get("WANDB_BASE_URL", _base_of_settings()).rstrip("/")
        public = os.environ.get("WANDB_PUBLIC_BASE_URL", "").rstrip("/") or base
        server = os.environ.get("WF_TRACE_SERVER_URL", TRACES if public == WANDB else f"{public}/traces")
        # A user and a password in an address are sent in place of the key.
        if is_local(server) or "@" in urlsplit(server).netloc or _is_in_netrc(urlsplit(base).netloc):
            return
    except (OSError, ValueError, configparser.Error, netrc.NetrcParseError):
        return
    raise missing_key()


def missing_key() -> ConfigError:
    """Return the error of a run without a key."""
    return ConfigError(
        "weave has no API key",
        "set WANDB_API_KEY, or run `wandb login`; for a server of your own set WANDB_BASE_URL, WF_TRACE_SERVER_URL "
        "and WANDB_API_KEY, as `agentloop trace serve` prints them",
    )


def _base_of_settings() -> str:
    """Return the address of W&B that its files of settings name."""
    settings = configparser.ConfigParser()
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb")
    settings.read([folder / "settings", Path("wandb") / "settings"])
    return settings.get("default", "base_url", fallback=WANDB)


def _is_in_netrc(machine: str) -> bool:
    for name in (".netrc", "_netrc"):
        path = Path.home() / name
        if path.exists():
            found = netrc.netrc(path).authenticators(machine)
            if found is not None and found[2]:
                return True
    return False
