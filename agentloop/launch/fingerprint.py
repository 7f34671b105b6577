"""What Python, packages and code a machine runs this project with.

The program is sent to each node as text and run there by the interpreter of the run's processes, so
it imports nothing but the standard library: a node that lacks a package reports that.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("agentloop", "rollout_server", "trainer", "tools")
"""Packages of this project whose code must be equal."""

VERSIONS = (
    "torch", "transformers", "numpy", "safetensors", "tokenizers", "pydantic", "msgspec", "orjson", "httpx", "uvicorn",
    "fastapi", "peft", "pillow", "sglang", "flash-attn", "liger-kernel",
)  # fmt: skip
"""Distributions whose version changes what a run computes or sends."""

PLUGIN_GROUPS = "agentloop."
"""Beginning of the entry point groups in which users register packages."""


def fingerprint() -> dict[str, str]:
    """Return interpreter, versions, and a hash of each package's files, by name."""
    found = {"python": f"{platform.python_implementation()} {platform.python_version()}", "executable": sys.executable}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "-"
    for package in (*PACKAGES, *_registered()):
        found[f"code of {package}"] = _code(package)
    return found


def _registered() -> list[str]:
    """Return the top-level packages of other distributions that register something."""
    groups = [group for group in metadata.entry_points().groups if group.startswith(PLUGIN_GROUPS)]
    names = {entry.module.partition(".")[0] for group in groups for entry in metadata.entry_points(group=group)}
    return sorted(names - {*PACKAGES})


def _code(package: str) -> str:
    """Return the start of a sha256 over the names and bytes of a package's files."""
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return "-"
    files = {
        path.relative_to(folder).as_posix(): path
        for folder in spec.submodule_search_locations or ()
        for path in Path(folder).rglob("*")
        if "__pycache__" not in path.parts and path.is_file()
    }
    if not files and spec.origin:
        files = {Path(spec.origin).name: Path(spec.origin)}
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        try:
            content = hashlib.sha256(path.read_bytes()).digest()
        except OSError:
            content = b"?"
        digest.update(name.encode() + b"\0" + content)
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    print(json.dumps(fingerprint()))
