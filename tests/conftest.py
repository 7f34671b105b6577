"""What all tests share: one thread per process, and the material beside the repository when it is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch is imported anywhere: several test processes share the cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

Install = Callable[[str, str, str], None]
REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return REPO


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data, tokenizers and templates, kept beside the repository or named by AGENTLOOP_SHARED."""
    folder = Path(os.environ.get("AGENTLOOP_SHARED", REPO.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no real material in {folder}: set AGENTLOOP_SHARED")
    return folder


@pytest.fixture(scope="session")
def quickstart_model(repo: Path) -> Path:
    """The warm-started model that the quickstart begins with."""
    return repo / "recipes" / "quickstart" / "model"


@pytest.fixture
def install(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a package of one module with entry points for the length of a test: (module, source, entry points)."""
    from agentloop.registry import registered

    def add(module: str, source: str, entry_points: str) -> None:
        site = tmp_path_factory.mktemp("site")
        (site / f"{module}.py").write_text(source)
        info = site / f"{module}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(entry_points)
        monkeypatch.syspath_prepend(site)
        registered.cache_clear()

    yield add
    registered.cache_clear()
