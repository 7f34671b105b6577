"""Check that the imported packages are ours: `trainer`, `tools` and `recipes` are common names."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from agentloop.errors import ConfigError
from agentloop.text import hide_override

PACKAGES = ("agentloop", "rollout_server", "trainer", "tools", "recipes")
MARKER = "AGENTLOOP_PACKAGE"
"""Each package of this project sets `AGENTLOOP_PACKAGE = "<distribution>"` in `__init__.py`."""

DISTRIBUTION = "agentloop-rl"


@dataclass(frozen=True)
class PackageOrigin:
    """The file that a package would be imported from, and whether it belongs to this project."""

    name: str
    path: str | None
    ours: bool


def package_origins() -> list[PackageOrigin]:
    """Find the packages without importing them, because an import would run unknown code."""
    origins = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        path = spec.origin if spec and spec.origin else None
        if path is None and spec and spec.submodule_search_locations:  # a namespace package has folders only
            path = next(iter(spec.submodule_search_locations), None)
        origins.append(PackageOrigin(name, path, _is_ours(name, path)))
    return origins


def check_packages() -> None:
    """Stop if one of the packages belongs to another distribution.

    Raises:
        ConfigError: names the package and the file that is imported in its place.
    """
    for origin in package_origins():
        if not origin.ours:
            raise ConfigError(
                f"the package {origin.name!r} is not agentloop's: it "
                + (f"is imported from {origin.path}" if origin.path else "cannot be found"),
                "start from another folder, remove that one from PYTHONPATH, or reinstall with "
                f"`pip install --force-reinstall --no-deps {DISTRIBUTION}`",
            )


def environment() -> dict[str, Any]:
    """Describe the machine and the installed versions; a run writes this to `env.json`."""
    versions = {}
    for name in (
        "torch",
        "transformers",
        "numpy",
        "fastapi",
        "httpx",
        "pydantic",
        "sglang",
        "flash-attn",
        "ray",
    ):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    try:
        own = metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        own = "not installed"
    return {
        DISTRIBUTION: own,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(_memory_bytes() / 2**30, 1),
        "versions": versions,
        "packages": {origin.name: origin.path for origin in package_origins()},
        "argv": [hide_override(word) for word in sys.argv[1:]],
    }


def _is_ours(name: str, path: str | None) -> bool:
    if path is None or not path.endswith("__init__.py"):
        return False
    try:
        return f'{MARKER} = "{DISTRIBUTION}"' in Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def _memory_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().total)
