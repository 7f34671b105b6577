"""Download files of the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def may_be_hub_id(name: str) -> bool:
    """Whether `name` has the form of a hub id (`owner/name` or `name`); a path may have it too."""
    return _HUB_ID.fullmatch(name) is not None


def download(hub_id: str, patterns: Sequence[str], *, repo_type: str = "model") -> Path:
    """Download a repository of the Hugging Face hub into the local cache, and return its folder.

    Args:
        patterns: files to fetch, as shell patterns.
        repo_type: "model" or "dataset".

    Raises:
        OSError: the download failed; its text is one line.
    """
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(hub_id, repo_type=repo_type, allow_patterns=list(patterns)))
    except (OSError, HFValidationError, httpx.HTTPError) as exc:
        lines = str(exc).strip().splitlines()
        raise OSError(lines[0] if lines else type(exc).__name__) from exc


def cached_file(hub_id: str, file: str) -> Path | None:
    """Return one file of a hub model if it was downloaded before. Downloads nothing."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(hub_id, file)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
