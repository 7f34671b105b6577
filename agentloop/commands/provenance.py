"""Check that the imported packages are ours: `trainer`, `tools` and `recipes` are common names."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from agentloop.errors import ConfigError
from agentloop.imports import DISTRIBUTION, PACKAGES, is_ours, package_place
from agentloop.text import hide_override


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
        place = package_place(name)
        origins.append(PackageOrigin(name, str(place) if place else None, place is not None and is_ours(place)))
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


def _memory_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().total)
