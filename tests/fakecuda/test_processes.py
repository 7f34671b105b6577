"""A process uses its own card only: a context on another one takes half a gigabyte of it, unseen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakecuda.cards import RANK
from tests.fakecuda.conftest import ModelFactory

pytestmark = pytest.mark.fakecuda


def cards_of(repo: Path, *program: str) -> list[int]:
    done = subprocess.run([sys.executable, *program], cwd=repo, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(("part", "cards"), [("trainer", [RANK]), ("engine", [])])
def test_a_process_touches_no_other_card(model: ModelFactory, repo: Path, part: str, cards: list[int]) -> None:
    folder = model("Qwen2.5-0.5B", num_hidden_layers=2)
    assert cards_of(repo, "-m", "tests.fakecuda.rank_program", part, str(folder)) == cards


def test_a_stray_stream_shows(fake_runtime: None, repo: Path) -> None:
    program = (
        "import json, threading, torch; from tests.fakecuda.cards import used_cards; torch.cuda.set_device(2);"
        "thread = threading.Thread(target=torch.cuda.Stream); thread.start(); thread.join();"
        "print(json.dumps(sorted(used_cards())))"
    )
    assert cards_of(repo, "-c", program) == [0]
