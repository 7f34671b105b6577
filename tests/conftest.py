"""What all tests share: one thread per process, and the material beside the repository when it is there."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Before torch is imported anywhere: several test processes share the cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest

from tests.agentloop.viewer.trace_server import CLOSED
from tests.forked_programs import ForkedPrograms

Install = Callable[[str, str, str], None]

CONTROL = re.compile(
    r"<\|[\w▁]+\|>|<(?:bos|eos|sop|start_of_turn|end_of_turn|start_of_image|think|tool_call|arg_key|arg_value)>|</(?:think|\w+_call|arg_\w+)>"
    r"|\[gMASK\]"
)

REPO = Path(__file__).resolve().parents[1]

LONGEST = ("e2e", "recipes", "conformance", "rollout_server", "trainer", "tools")
"""Folders of the tests that start processes, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that the processes of pytest-xdist end at about the same time.

    `--no-loadscope-reorder` makes it keep this order.
    """
    ranks = {folder: rank for rank, folder in enumerate(LONGEST)}
    tests = Path(__file__).parent
    items.sort(key=lambda item: ranks.get(item.path.relative_to(tests).parts[0], len(LONGEST)))


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


@pytest.fixture(scope="session")
def renderer_of(shared: Path) -> Callable[..., Any]:
    """Makes the `ChatRenderer` of a real template; the Qwen tokenizer gets the control tokens of all of them."""
    from transformers import PreTrainedTokenizerFast

    from agentloop.chat import ChatRenderer

    templates = {path.stem: path.read_text() for path in (shared / "chat_templates").glob("*.jinja")}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(shared / "tokenizers" / "qwen"))
    spellings = {token for template in templates.values() for token in CONTROL.findall(template)}
    tokenizer.add_tokens(sorted(spellings - set(tokenizer.get_vocab())), special_tokens=True)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    return lambda name, **options: ChatRenderer(tokenizer, chat_template=templates[name], **options)


@pytest.fixture(scope="session")
def bubblewrap() -> None:
    """The code sandbox isolates programs with it."""
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed: apt-get install bubblewrap")


@pytest.fixture(scope="session")
def weave_programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedPrograms]:
    """Runs programs that use weave, each in a process of its own, without the seconds of its import."""
    if find_spec("weave") is None:  # not imported here: it takes seconds, also in this process
        pytest.skip("weave is not installed: make install")
    kept = ("PATH", "HOME", "TMPDIR", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name in kept}
    environment |= {"WANDB_ERROR_REPORTING": "false", "HTTPS_PROXY": CLOSED, "ALL_PROXY": CLOSED}
    folder = tmp_path_factory.mktemp("weave_programs")
    made = ForkedPrograms("weave", "agentloop.trace.weave.client", environment=environment, folder=folder)
    yield made
    made.close()
