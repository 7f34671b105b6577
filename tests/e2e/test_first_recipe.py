"""The recipe of docs/first_recipe.md, copied from the page, is checked and trained."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

FILE = re.compile(r"^`([\w.]+)` .*?^```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def files(page: str) -> dict[str, str]:
    """The files of the page: each paragraph that begins with a file's name, and the block that follows it."""
    return dict(FILE.findall(page))


def test_the_recipe_of_the_page_trains(agentloop: Any, repo: Path, tmp_path: Path) -> None:
    found = files((repo / "docs" / "first_recipe.md").read_text())
    assert sorted(found) == ["agent.py", "recipe.yaml", "reward.py", "rows.jsonl", "tool.py", "tools.yaml"]
    for name, text in found.items():
        (tmp_path / name).write_text(text)
    shutil.copytree(repo / "recipes" / "quickstart" / "model", tmp_path / "quickstart" / "model")

    recipe = str(tmp_path / "recipe.yaml")
    check = agentloop("check", recipe)
    assert check.code == 0, check.err
    assert "no problem found" in check.out and "multiply" in check.out and "warning" not in check.out + check.err
    run = agentloop("train", recipe, f"run.dir={tmp_path}/run", "trainer.lora=true")
    assert run.code == 0, run.err
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 2
