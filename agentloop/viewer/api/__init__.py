"""The JSON API of the viewer: runs, episodes, tokens, signals, and events while a run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastapi import APIRouter


def build_router(runs: Sequence[Path]) -> APIRouter:
    """Return the routes below `/api`.

    Args:
        runs: run directories, and folders of run directories; one that does not exist yet has none.
    """
    return APIRouter(prefix="/api")
